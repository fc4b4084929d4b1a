//! An event on its way into the producer's queue, with the messages that belong to it.

use std::{sync::Arc, time::SystemTime};

use tokio_util::sync::CancellationToken;

use super::{
    envelope::{Envelope, Origin, Table, since_1970},
    error::{Error, Poison},
    json,
    pgoutput::{Old, Tuple},
};
use crate::stream::producer::{Headers, Outgoing, Producer, Receipt};

/// Streaming was told to stop while a message waited for room in the queue.
pub(super) enum Flow {
    On,
    Stopped,
}

/// How far a changed key had come when it turned out not to be writable.
pub(super) enum Sent {
    Nothing,
    Deletion,
}

/// What it takes to send: borrowed apart from the tables, which are borrowed too.
pub(super) struct Wire<'a> {
    pub(super) producer: &'a Producer,
    pub(super) stop: &'a CancellationToken,
    pub(super) receipt: &'a Arc<Receipt>,
    pub(super) now: SystemTime,
    /// On every event of a table.
    pub(super) context: Option<&'a Headers>,
}

impl Wire<'_> {
    pub(super) async fn event(&self, table: &Table, envelope: &Envelope) -> Result<Flow, Error> {
        self.event_with(table, envelope, self.context).await
    }

    /// The event and its tombstone.
    pub(super) async fn deletion(&self, table: &Table, envelope: &Envelope) -> Result<Flow, Error> {
        self.deletion_with(table, envelope, self.context).await
    }

    async fn event_with(&self, table: &Table, envelope: &Envelope, headers: Option<&Headers>) -> Result<Flow, Error> {
        let outgoing = Outgoing {
            topic: &table.topic,
            partition: None,
            key: key_of(&envelope.key),
            value: Some(&envelope.value),
            headers,
            timestamp_ms: millis(self.now),
        };
        send(self.producer, self.stop, outgoing, self.receipt).await
    }

    async fn deletion_with(&self, table: &Table, envelope: &Envelope, headers: Option<&Headers>) -> Result<Flow, Error> {
        if let Flow::Stopped = self.event_with(table, envelope, headers).await? {
            return Ok(Flow::Stopped);
        }
        let tombstone = Outgoing { topic: &table.topic, partition: None, key: key_of(&envelope.key), value: None, headers, timestamp_ms: millis(self.now) };
        send(self.producer, self.stop, tombstone, self.receipt).await
    }

    /// A changed key: delete, tombstone and create, each with the other's key as a header.
    pub(super) async fn moved(
        &self,
        table: &Table,
        envelope: &mut Envelope,
        old: &Old<'_>,
        new: Tuple<'_>,
        (deleted, created): (&Origin, &Origin),
    ) -> Result<Result<Flow, (Poison, Sent)>, Error> {
        // The update that turned out to be a move left both keys behind.
        let to_new = Headers::of("__debezium.newkey", &json::as_header(&envelope.key)).and_all(self.context);
        let from_old = Headers::of("__debezium.oldkey", &json::as_header(&envelope.old_key)).and_all(self.context);
        if let Err(poison) = envelope.write_delete(table, old, deleted, self.now) {
            return Ok(Err((poison, Sent::Nothing)));
        }
        if let Flow::Stopped = self.deletion_with(table, envelope, Some(&to_new)).await? {
            return Ok(Ok(Flow::Stopped));
        }
        if let Err(poison) = envelope.write_moved(table, old, new, created, self.now) {
            return Ok(Err((poison, Sent::Deletion)));
        }
        self.event_with(table, envelope, Some(&from_old)).await.map(Ok)
    }
}

fn key_of(key: &[u8]) -> Option<&[u8]> {
    (!key.is_empty()).then_some(key)
}

/// Puts a message into the queue. A full queue is waited for, unless the stage is told to stop.
pub(super) async fn send(producer: &Producer, stop: &CancellationToken, outgoing: Outgoing<'_>, receipt: &Arc<Receipt>) -> Result<Flow, Error> {
    if producer.try_send(outgoing, receipt)? {
        return Ok(Flow::On);
    }
    tokio::select! {
        () = stop.cancelled() => Ok(Flow::Stopped),
        sent = producer.send(outgoing, receipt) => Ok(sent.map(|()| Flow::On)?),
    }
}

/// Kafka's timestamp.
pub(super) fn millis(now: SystemTime) -> i64 {
    i64::try_from(since_1970(now).as_millis()).unwrap_or(i64::MAX)
}

/// As Debezium's `ts_us`.
pub(super) fn micros(now: SystemTime) -> i64 {
    i64::try_from(since_1970(now).as_micros()).unwrap_or(i64::MAX)
}
