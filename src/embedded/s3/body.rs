//! A request's body on its way to the disk: streamed, hashed on the way, refused unless it is what the client meant to send.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write as _},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use s3s::{
    S3Error, S3Result, StdError, TrailingHeaders,
    checksum::ChecksumHasher,
    crypto::{Checksum as _, Md5},
    dto::StreamingBlob,
    s3_error,
};
use tokio::task::JoinHandle;

use super::{
    blob::Draft,
    change::Body,
    commit::Base,
    convert::{full, on_disk},
};

/// Bodies up to this size lie in the index: one flush instead of three. Commit records of the lake are far below it.
const SMALL_BYTES_MAX: usize = 8 << 10;
/// Bytes gathered before they are hashed and written on a thread that may block.
const WRITE_BYTES: usize = 1 << 20;
/// Read of a body that is refused already; who sends more is cut off.
const DISCARD_BYTES_MAX: usize = 64 << 20;

pub(super) const ALGORITHMS: [&str; 5] = ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"];

/// What the client says about the bytes.
#[derive(Default)]
pub(super) struct Claims {
    /// Algorithm → base64, from the headers.
    pub(super) checksums: BTreeMap<&'static str, String>,
    /// Algorithms whose value comes behind the body.
    pub(super) announced: Vec<&'static str>,
    pub(super) content_md5: Option<String>,
    pub(super) trailers: Option<TrailingHeaders>,
}

/// Bytes that are durable (or small) and as claimed, but that nothing refers to yet.
pub(super) struct Received {
    pub(super) size: u64,
    pub(super) md5: String,
    pub(super) checksums: BTreeMap<String, String>,
    pub(super) body: Body,
}

/// Whether a body may be kept in the index.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    SmallInIndex,
    AlwaysAFile,
}

/// Takes the whole body. Dropped in the middle, it leaves nothing behind.
pub(super) async fn receive(base: &Arc<Base>, mut stream: Option<StreamingBlob>, claims: Claims, keep: Keep) -> S3Result<Received> {
    let received = take(base, &mut stream, claims, keep).await;
    if received.is_err() {
        discard(stream).await;
    }
    received
}

/// Reads what a refused client still sends: one that cannot finish writing never reads why it was refused.
pub(super) async fn discard(stream: Option<StreamingBlob>) {
    let Some(mut stream) = stream else { return };
    let mut bytes = 0;
    while let Some(Ok(chunk)) = stream.next().await {
        bytes += chunk.len();
        if bytes > DISCARD_BYTES_MAX {
            return;
        }
    }
}

async fn take(base: &Arc<Base>, stream: &mut Option<StreamingBlob>, claims: Claims, keep: Keep) -> S3Result<Received> {
    // In an Option because they move to whichever thread hashes.
    let mut digests = Some(Digests::new(&claims));
    let mut waiting = Vec::new();
    let mut waiting_bytes = 0;
    let mut writer: Option<JoinHandle<io::Result<Writer>>> = None;
    while let Some(open) = stream.as_mut() {
        let chunk = match open.next().await {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => {
                // Nothing more can be read of it.
                *stream = None;
                return Err(torn(&error));
            }
            None => break,
        };
        waiting_bytes += chunk.len();
        waiting.push(chunk);
        if waiting_bytes >= WRITE_BYTES {
            let chunks = std::mem::take(&mut waiting);
            waiting_bytes = 0;
            writer = Some(write(base, writer.take(), &mut digests, chunks).await?);
        }
    }
    if writer.is_none() && waiting_bytes <= SMALL_BYTES_MAX && keep == Keep::SmallInIndex {
        let bytes = joined(waiting);
        let mut digests = digests.take().expect("no writer has them");
        digests.update(&bytes);
        let (md5, checksums) = digests.verify(&claims)?;
        return Ok(Received { size: bytes.len() as u64, md5, checksums, body: Body::Small(bytes) });
    }
    let last = write(base, writer, &mut digests, waiting).await?;
    let writer = last.await.map_err(|_| s3_error!(InternalError, "the writer panicked"))?.map_err(|error| on_disk(base, &error))?;
    let size = writer.size;
    let (digests, draft) = tokio::task::spawn_blocking(move || writer.finish())
        .await
        .map_err(|_| s3_error!(InternalError, "the writer panicked"))?
        .map_err(|error| on_disk(base, &error))?;
    let (md5, checksums) = digests.verify(&claims)?;
    Ok(Received { size, md5, checksums, body: Body::Files(vec![draft]) })
}

/// Hands chunks to the disk and returns at once; waits only for the chunks before them.
async fn write(
    base: &Arc<Base>,
    before: Option<JoinHandle<io::Result<Writer>>>,
    digests: &mut Option<Digests>,
    chunks: Vec<Bytes>,
) -> S3Result<JoinHandle<io::Result<Writer>>> {
    let writer = match before {
        Some(before) => Some(before.await.map_err(|_| s3_error!(InternalError, "the writer panicked"))?.map_err(|error| on_disk(base, &error))?),
        None if !base.has_room() => return Err(full(base)),
        None => None,
    };
    let digests = digests.take();
    let base = Arc::clone(base);
    Ok(tokio::task::spawn_blocking(move || {
        let mut writer = match (writer, digests) {
            (Some(writer), _) => writer,
            (None, digests) => {
                let (draft, file) = base.blobs.create()?;
                Writer { draft, file, digests: digests.ok_or_else(|| io::Error::other("the hashes of a body went astray"))?, size: 0 }
            }
        };
        for chunk in chunks {
            writer.digests.update(&chunk);
            writer.file.write_all(&chunk)?;
            writer.size += chunk.len() as u64;
        }
        Ok(writer)
    }))
}

struct Writer {
    draft: Draft,
    file: File,
    digests: Digests,
    size: u64,
}

impl Writer {
    fn finish(self) -> io::Result<(Digests, Draft)> {
        self.file.sync_data()?;
        Ok((self.digests, self.draft))
    }
}

struct Digests {
    md5: Md5,
    sums: ChecksumHasher,
}

impl Digests {
    fn new(claims: &Claims) -> Self {
        let mut sums = ChecksumHasher::default();
        for algorithm in claims.checksums.keys().chain(&claims.announced) {
            match *algorithm {
                "crc32" => sums.crc32 = Some(s3s::crypto::Crc32::new()),
                "crc32c" => sums.crc32c = Some(s3s::crypto::Crc32c::new()),
                "crc64nvme" => sums.crc64nvme = Some(s3s::crypto::Crc64Nvme::new()),
                "sha1" => sums.sha1 = Some(s3s::crypto::Sha1::new()),
                _ => sums.sha256 = Some(s3s::crypto::Sha256::new()),
            }
        }
        Self { md5: Md5::new(), sums }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.md5.update(bytes);
        self.sums.update(bytes);
    }

    /// The MD5 in hex and every checksum that was asked for, if all are as claimed. Call after the body's end.
    fn verify(self, claims: &Claims) -> S3Result<(String, BTreeMap<String, String>)> {
        let md5 = self.md5.finalize();
        if claims.content_md5.as_ref().is_some_and(|claimed| *claimed != base64(&md5)) {
            return Err(s3_error!(BadDigest, "the Content-MD5 you specified did not match what we received"));
        }
        let sums = self.sums.finalize();
        let computed = [
            ("crc32", sums.checksum_crc32),
            ("crc32c", sums.checksum_crc32c),
            ("crc64nvme", sums.checksum_crc64nvme),
            ("sha1", sums.checksum_sha1),
            ("sha256", sums.checksum_sha256),
        ];
        let mut checksums = BTreeMap::new();
        for (algorithm, computed) in computed {
            let Some(computed) = computed else { continue };
            let trailer = format!("x-amz-checksum-{algorithm}");
            let behind = claims
                .trailers
                .as_ref()
                .and_then(|it| it.read(|headers| headers.get(&trailer).and_then(|value| value.to_str().ok()).map(str::to_owned)).flatten());
            let claimed = claims.checksums.get(algorithm).or(behind.as_ref());
            if claimed.is_none() && claims.announced.contains(&algorithm) && claims.trailers.is_some() {
                return Err(s3_error!(InvalidRequest, "the announced trailer {trailer} is missing"));
            }
            if claimed.is_some_and(|claimed| *claimed != computed) {
                return Err(s3_error!(BadDigest, "the {algorithm} you specified did not match what we received"));
            }
            checksums.insert(algorithm.to_owned(), computed);
        }
        Ok((hex::encode(md5), checksums))
    }
}

/// A body that ended early or was not what its signature says.
fn torn(error: &StdError) -> S3Error {
    let said = error.to_string();
    // The error types behind this are private to s3s; their names are all there is.
    if said.contains("SignatureMismatch") {
        s3_error!(SignatureDoesNotMatch, "a chunk of the body does not match its signature")
    } else if said.contains("Sha256Mismatch") {
        s3_error!(BadDigest, "the body does not match x-amz-content-sha256")
    } else {
        s3_error!(IncompleteBody, "the body ended early: {said}")
    }
}

fn joined(mut chunks: Vec<Bytes>) -> Bytes {
    match chunks.len() {
        1 => chunks.remove(0),
        _ => chunks.concat().into(),
    }
}

/// Only for sixteen bytes of MD5; checksums come encoded.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().enumerate().fold(0_u32, |bits, (place, byte)| bits | u32::from(*byte) << (16 - 8 * place));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn a_claim_that_differs_is_refused() {
        let claims = |value: &str| Claims { checksums: BTreeMap::from([("crc32", value.to_owned())]), ..Claims::default() };
        let digest = |claims: &Claims| {
            let mut digests = Digests::new(claims);
            digests.update(b"hel");
            digests.update(b"lo");
            digests.verify(claims)
        };

        let (md5, checksums) = digest(&claims("NhCmhg==")).unwrap();

        assert_eq!(md5, "5d41402abc4b2a76b9719d911017c592");
        assert_eq!(checksums["crc32"], "NhCmhg==");
        assert!(digest(&claims("AAAAAA==")).is_err());
    }
}
