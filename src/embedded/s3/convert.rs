//! Between S3's words and ours.

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use s3s::{S3Error, S3Result, dto::*, s3_error};

use super::{
    body::{ALGORITHMS, Received},
    change::{Body, Condition, Refusal},
    commit::Base,
    index::{Object as Stored, Place, Segment},
};

/// What a request claims about its body: the same fields in a put and in a part.
macro_rules! claims {
    ($request:expr) => {{
        let input = &$request.input;
        let given = [
            ("crc32", &input.checksum_crc32),
            ("crc32c", &input.checksum_crc32c),
            ("crc64nvme", &input.checksum_crc64nvme),
            ("sha1", &input.checksum_sha1),
            ("sha256", &input.checksum_sha256),
        ];
        let announced = $request.headers.get("x-amz-trailer").and_then(|it| it.to_str().ok()).unwrap_or_default();
        $crate::embedded::s3::body::Claims {
            checksums: given.into_iter().filter_map(|(name, value)| value.clone().map(|value| (name, value))).collect(),
            announced: $crate::embedded::s3::convert::announced(announced),
            content_md5: input.content_md5.clone(),
            trailers: $request.trailing_headers.clone(),
        }
    }};
}

/// Writes the checksums into an answer: the same fields in every one.
macro_rules! give_checksums {
    ($output:expr, $checksums:expr) => {{
        let mut checksums = $checksums;
        $output.checksum_crc32 = checksums.remove("crc32");
        $output.checksum_crc32c = checksums.remove("crc32c");
        $output.checksum_crc64nvme = checksums.remove("crc64nvme");
        $output.checksum_sha1 = checksums.remove("sha1");
        $output.checksum_sha256 = checksums.remove("sha256");
    }};
}
pub(super) use {claims, give_checksums};

/// The checksum algorithms among the announced trailers.
pub(super) fn announced(trailers: &str) -> Vec<&'static str> {
    let named = |algorithm: &&str| trailers.split(',').any(|it| it.trim().strip_prefix("x-amz-checksum-") == Some(algorithm));
    ALGORITHMS.into_iter().filter(named).collect()
}

/// What a put wants to hold. S3 knows no other conditions on writing than these.
pub(super) fn condition(if_none_match: Option<&IfNoneMatch>, if_match: Option<&IfMatch>) -> S3Result<Condition> {
    match (if_none_match, if_match) {
        (None, None) => Ok(Condition::None),
        (Some(ETagCondition::Any), None) => Ok(Condition::Absent),
        (None, Some(ETagCondition::Any)) => Ok(Condition::Present),
        (None, Some(ETagCondition::ETag(ETag::Strong(etag)))) => Ok(Condition::Etag(etag.clone())),
        _ => Err(s3_error!(NotImplemented, "only If-None-Match: * or If-Match: <strong etag> can be asked of a write")),
    }
}

pub(super) fn refused(base: &Base, refusal: Refusal) -> S3Error {
    match refusal {
        Refusal::NoSuchBucket => s3_error!(NoSuchBucket),
        Refusal::NoSuchKey => s3_error!(NoSuchKey),
        Refusal::NoSuchUpload => s3_error!(NoSuchUpload),
        Refusal::BucketExists => s3_error!(BucketAlreadyOwnedByYou),
        Refusal::BucketNotEmpty => s3_error!(BucketNotEmpty),
        Refusal::ConditionFailed => s3_error!(PreconditionFailed),
        Refusal::InvalidPart => s3_error!(InvalidPart, "a part is missing, or not the newest of its number"),
        Refusal::PartsOutOfOrder => s3_error!(InvalidPartOrder, "parts are listed by number, each once"),
        Refusal::PartTooSmall => s3_error!(EntityTooSmall, "every part but the last has at least 5 MiB"),
        Refusal::NoParts => s3_error!(MalformedXML, "an object needs at least one part"),
        Refusal::Full => full(base),
        Refusal::Broken(reason) => s3_error!(InternalError, "the object store cannot write its index: {reason}"),
    }
}

/// A failure of the files below a body: the client may try again once the operator has acted.
pub(super) fn on_disk(base: &Base, error: &io::Error) -> S3Error {
    if crate::embedded::is_disk_full(error) {
        base.ail(format!("the disk of {} is full: objects are refused until space is freed", base.dir.display()));
        return full(base);
    }
    tracing::error!(%error, "the object store cannot write to its directory");
    s3_error!(InternalError, "the object store cannot write: {error}")
}

pub(super) fn full(base: &Base) -> S3Error {
    s3_error!(SlowDown, "the disk of {} is full", base.dir.display())
}

/// The row of a body just received; where it lies.
pub(super) fn object_of(received: &Received, content_type: Option<String>, content_encoding: Option<String>, metadata: Option<Metadata>) -> Stored {
    let segments = match &received.body {
        Body::Small(_) => Vec::new(),
        Body::Files(drafts) => drafts.iter().map(|draft| Segment { id: draft.id, size: received.size }).collect(),
    };
    Stored {
        size: received.size,
        etag: received.md5.clone(),
        modified_ms: now_ms(),
        content_type,
        content_encoding,
        metadata: metadata.unwrap_or_default().into_iter().collect(),
        checksums: received.checksums.clone(),
        place: Place::Files(segments),
    }
}

pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|it| i64::try_from(it.as_millis()).ok()).unwrap_or(0)
}

pub(super) fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from(UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or(0)))
}

pub(super) fn length(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// Continuation tokens are the last item in hex: any key fits into XML and into a query.
pub(super) fn from_token(token: &str) -> S3Result<String> {
    let bytes = hex::decode(token).ok().and_then(|it| String::from_utf8(it).ok());
    bytes.ok_or_else(|| s3_error!(InvalidArgument, "the continuation token is not one of ours"))
}

/// Writes keys into listings, percent-encoded where the client asked for it: XML cannot say every character.
pub(super) struct KeyWriter {
    encode: bool,
}

impl KeyWriter {
    pub(super) fn new(encoding: Option<&EncodingType>) -> Self {
        Self { encode: encoding.is_some_and(|it| it.as_str() == EncodingType::URL) }
    }

    pub(super) fn key(&self, key: &str) -> String {
        if !self.encode {
            return key.to_owned();
        }
        let mut text = String::with_capacity(key.len());
        for byte in key.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => text.push(char::from(byte)),
                other => text.push_str(&format!("%{other:02X}")),
            }
        }
        text
    }

    pub(super) fn objects(&self, objects: Vec<(String, Stored)>) -> Vec<Object> {
        let object = |(key, stored): (String, Stored)| Object {
            key: Some(self.key(&key)),
            size: Some(length(stored.size)),
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(timestamp(stored.modified_ms)),
            storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
            ..Default::default()
        };
        objects.into_iter().map(object).collect()
    }

    pub(super) fn prefixes(&self, prefixes: Vec<String>) -> Vec<CommonPrefix> {
        prefixes.into_iter().map(|it| CommonPrefix { prefix: Some(self.key(&it)) }).collect()
    }
}
