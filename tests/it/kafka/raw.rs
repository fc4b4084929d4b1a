//! A client that speaks the protocol by hand: any request in any version, and bytes that no client would send.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::{
    messages::{
        ApiKey, CreateTopicsRequest, FetchRequest, FetchResponse, ProduceRequest, ProduceResponse, RequestHeader, ResponseHeader, TopicName,
        create_topics_request::CreatableTopic,
        fetch_request::{FetchPartition, FetchTopic},
        produce_request::{PartitionProduceData, TopicProduceData},
    },
    protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes},
};

pub(crate) fn text(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

pub(crate) fn topic(name: &str) -> TopicName {
    TopicName(text(name))
}

pub(crate) struct Client {
    socket: TcpStream,
    correlation_id: i32,
}

impl Client {
    pub(crate) fn connect(address: &str) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket, correlation_id: 0 }
    }

    /// Sends a request and reads its answer, which must be readable to its last byte.
    pub(crate) fn ask<R: Request>(&mut self, version: i16, request: &R) -> R::Response {
        let correlation_id = self.send(version, request);
        self.answer::<R>(version, correlation_id)
    }

    pub(crate) fn send<R: Request>(&mut self, version: i16, request: &R) -> i32 {
        self.correlation_id += 1;
        self.send_bytes(&frame(self.correlation_id, version, request));
        self.correlation_id
    }

    pub(crate) fn answer<R: Request>(&mut self, version: i16, correlation_id: i32) -> R::Response {
        let mut answer = self.read_frame().expect("an answer");
        let header = ResponseHeader::decode(&mut answer, R::Response::header_version(version)).unwrap();
        assert_eq!(header.correlation_id, correlation_id, "answers come in the order of their requests");
        let response = R::Response::decode(&mut answer, version).unwrap();
        assert!(answer.is_empty(), "{} bytes too many in version {version} of api {}", answer.len(), R::KEY);
        response
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// None once the broker has closed the connection.
    pub(crate) fn read_frame(&mut self) -> Option<Bytes> {
        let mut length = [0; 4];
        self.socket.read_exact(&mut length).ok()?;
        let mut frame = vec![0; usize::try_from(i32::from_be_bytes(length)).unwrap()];
        self.socket.read_exact(&mut frame).ok()?;
        Some(frame.into())
    }

    pub(crate) fn create(&mut self, name: &str, partitions: i32) {
        let wanted = CreatableTopic::default().with_name(topic(name)).with_num_partitions(partitions).with_replication_factor(1);
        let response = self.ask(5, &CreateTopicsRequest::default().with_topics(vec![wanted]).with_timeout_ms(5_000));
        assert_eq!(response.topics[0].error_code, 0);
    }

    /// Error code and base offset.
    pub(crate) fn produce(&mut self, name: &str, partition: i32, records: Bytes) -> (i16, i64) {
        outcome(&self.ask(9, &produce_request(name, partition, -1, records)))
    }

    pub(crate) fn fetch(&mut self, name: &str, partition: i32, offset: i64) -> (i16, i64, Bytes) {
        fetched(&self.ask(11, &fetch_request(name, partition, offset)))
    }
}

pub(crate) fn outcome(response: &ProduceResponse) -> (i16, i64) {
    let part = &response.responses[0].partition_responses[0];
    (part.error_code, part.base_offset)
}

/// Error code, high watermark, records.
pub(crate) fn fetched(response: &FetchResponse) -> (i16, i64, Bytes) {
    let part = &response.responses[0].partitions[0];
    (part.error_code, part.high_watermark, part.records.clone().unwrap_or_default())
}

pub(crate) fn frame<R: Request>(correlation_id: i32, version: i16, request: &R) -> Vec<u8> {
    let key = ApiKey::try_from(R::KEY).unwrap();
    let mut body = BytesMut::new();
    let header = RequestHeader::default().with_request_api_key(R::KEY).with_request_api_version(version);
    let header = header.with_correlation_id(correlation_id).with_client_id(Some(text("by-hand")));
    header.encode(&mut body, key.request_header_version(version)).unwrap();
    request.encode(&mut body, version).unwrap();
    let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(&body);
    frame
}

pub(crate) fn produce_request(name: &str, partition: i32, acks: i16, records: Bytes) -> ProduceRequest {
    let part = PartitionProduceData::default().with_index(partition).with_records(Some(records));
    let data = TopicProduceData::default().with_name(topic(name)).with_partition_data(vec![part]);
    ProduceRequest::default().with_acks(acks).with_timeout_ms(5_000).with_topic_data(vec![data])
}

pub(crate) fn fetch_request(name: &str, partition: i32, offset: i64) -> FetchRequest {
    let part = FetchPartition::default().with_partition(partition).with_fetch_offset(offset).with_partition_max_bytes(1 << 20);
    let wanted = FetchTopic::default().with_topic(topic(name)).with_partitions(vec![part]);
    FetchRequest::default().with_max_bytes(8 << 20).with_max_wait_ms(0).with_min_bytes(0).with_topics(vec![wanted])
}

/// Who a batch comes from: producer id, epoch, first sequence.
pub(crate) const ANYBODY: (i64, i16, i32) = (-1, -1, -1);

/// An uncompressed batch, one record per value, a millisecond apart.
pub(crate) fn batch(values: &[&[u8]], first_timestamp: i64, producer: (i64, i16, i32)) -> Bytes {
    let mut records = Vec::new();
    for (n, value) in (0_i64..).zip(values) {
        let mut record = vec![0];
        varint(&mut record, n);
        varint(&mut record, n);
        varint(&mut record, -1);
        varint(&mut record, i64::try_from(value.len()).unwrap());
        record.extend_from_slice(value);
        varint(&mut record, 0);
        varint(&mut records, i64::try_from(record.len()).unwrap());
        records.extend(record);
    }
    let n_records = i32::try_from(values.len()).unwrap();
    let mut checked = BytesMut::new();
    checked.put_i16(0);
    checked.put_i32(n_records - 1);
    checked.put_i64(first_timestamp);
    checked.put_i64(first_timestamp + i64::from(n_records) - 1);
    checked.put_i64(producer.0);
    checked.put_i16(producer.1);
    checked.put_i32(producer.2);
    checked.put_i32(n_records);
    checked.extend_from_slice(&records);
    let mut batch = BytesMut::new();
    batch.put_i64(0);
    batch.put_i32(i32::try_from(checked.len() + 9).unwrap());
    batch.put_i32(-1);
    batch.put_u8(2);
    batch.put_u32(crc32c::crc32c(&checked));
    batch.extend_from_slice(&checked);
    batch.freeze()
}

fn varint(into: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    while rest >= 0x80 {
        into.push(u8::try_from(rest & 0x7F).unwrap() | 0x80);
        rest >>= 7;
    }
    into.push(u8::try_from(rest).unwrap());
}
