//! Objects on their way out: whole or a range, streamed from the disk, never held in memory.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::stream;
use s3s::{S3Result, dto::*, s3_error};

use super::{
    commit::Base,
    convert::{give_checksums, length, timestamp},
    index::{Object as Stored, Place, Segment},
    service::Service,
};

/// Read and sent at a time: large enough that the hop to a blocking thread does not show.
const READ_BYTES: u64 = 512 << 10;
/// Looks into the index before giving up: each needs the object to be overwritten between look and open.
const TRIES: usize = 5;

pub(super) async fn get(service: &Service, input: GetObjectInput) -> S3Result<GetObjectOutput> {
    for _ in 0..TRIES {
        let (stored, small) = service.find(&input.bucket, &input.key).await?;
        judge(&stored.etag, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let range = match input.range {
            Some(range) => range.check(stored.size).map_err(|_| s3_error!(InvalidRange))?,
            None => 0..stored.size,
        };
        let body = match (&stored.place, small) {
            (Place::Small(_), bytes) => slice(bytes.unwrap_or_default().into(), &range),
            (Place::Files(segments), _) => match open(&service.base, segments, range.clone()).await {
                Ok(body) => body,
                // Overwritten or deleted since the look: look again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(s3_error!(InternalError, "the object's bytes cannot be read: {error}")),
            },
        };
        return Ok(answer(stored, &range, input.range.is_some(), body, input.checksum_mode.is_some()));
    }
    Err(s3_error!(InternalError, "the bytes of the object are missing"))
}

/// Conditions on reading; a weak comparison is not offered.
pub(super) fn judge(etag: &str, if_match: Option<&IfMatch>, if_none_match: Option<&IfNoneMatch>) -> S3Result<()> {
    let is = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(wanted) => wanted.value() == etag,
    };
    if if_match.is_some_and(|it| !is(it)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(is) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

fn answer(stored: Stored, range: &Range<u64>, partial: bool, body: StreamingBlob, checksums: bool) -> GetObjectOutput {
    let mut output = GetObjectOutput {
        accept_ranges: Some("bytes".to_owned()),
        content_length: Some(length(range.end - range.start)),
        content_range: partial.then(|| format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), stored.size)),
        body: Some(body),
        e_tag: Some(ETag::Strong(stored.etag)),
        last_modified: Some(timestamp(stored.modified_ms)),
        content_type: stored.content_type,
        content_encoding: stored.content_encoding,
        metadata: Some(stored.metadata.into_iter().collect()),
        ..Default::default()
    };
    // A checksum of the whole would refuse a part of it.
    if checksums && !partial {
        give_checksums!(output, stored.checksums);
    }
    output
}

fn slice(bytes: Bytes, range: &Range<u64>) -> StreamingBlob {
    let at = |place: u64| usize::try_from(place).unwrap_or(usize::MAX).min(bytes.len());
    StreamingBlob::from(s3s::Body::from(bytes.slice(at(range.start)..at(range.end))))
}

/// Opens the first file at once, so that a vanished one is noticed before the answer begins.
async fn open(base: &Arc<Base>, segments: &[Segment], range: Range<u64>) -> io::Result<StreamingBlob> {
    let mut reader = Reader { base: Arc::clone(base), pieces: pieces(segments, range), open: None };
    let (reader, first) = tokio::task::spawn_blocking(move || reader.next().map(|first| (reader, first))).await.map_err(io::Error::other)??;
    let Some(first) = first else { return Ok(StreamingBlob::from(s3s::Body::empty())) };
    let rest = stream::unfold(Some((reader, Some(first))), |state| async {
        let (mut reader, ready) = state?;
        if let Some(bytes) = ready {
            return Some((Ok(bytes), Some((reader, None))));
        }
        match tokio::task::spawn_blocking(move || reader.next().map(|next| (reader, next))).await {
            Ok(Ok((reader, Some(bytes)))) => Some((Ok(bytes), Some((reader, None)))),
            Ok(Ok((_, None))) => None,
            Ok(Err(error)) => Some((Err(error), None)),
            Err(panicked) => Some((Err(io::Error::other(panicked)), None)),
        }
    });
    Ok(StreamingBlob::wrap(rest))
}

/// What is to be read of which file, in order (pure).
fn pieces(segments: &[Segment], range: Range<u64>) -> Vec<(u64, Range<u64>)> {
    let mut pieces = Vec::new();
    let mut begin = 0;
    for segment in segments {
        let end = begin + segment.size;
        let (from, to) = (range.start.max(begin), range.end.min(end));
        if from < to {
            pieces.push((segment.id, from - begin..to - begin));
        }
        begin = end;
    }
    // The reader takes them from the back.
    pieces.reverse();
    pieces
}

struct Reader {
    base: Arc<Base>,
    pieces: Vec<(u64, Range<u64>)>,
    open: Option<File>,
}

impl Reader {
    /// The next bytes, None at the end. Blocks.
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        let Some((id, range)) = self.pieces.last_mut() else { return Ok(None) };
        let file = match &mut self.open {
            Some(file) => file,
            none => {
                let mut file = File::open(self.base.blobs.path(*id))?;
                file.seek(SeekFrom::Start(range.start))?;
                none.insert(file)
            }
        };
        let size = (range.end - range.start).min(READ_BYTES);
        let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        file.read_exact(&mut bytes)?;
        range.start += size;
        if range.start == range.end {
            self.pieces.pop();
            self.open = None;
        }
        Ok(Some(bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_range_of_segments_is_the_range_of_the_whole(sizes in proptest::collection::vec(0_u64..9, 1..6), a in 0_u64..50, b in 0_u64..50) {
            let segments: Vec<Segment> = (0_u64..).zip(&sizes).map(|(id, size)| Segment { id, size: *size }).collect();
            let whole: Vec<(u64, u64)> = segments.iter().flat_map(|it| (0..it.size).map(move |place| (it.id, place))).collect();
            let size = whole.len() as u64;
            let range = a.min(b).min(size)..a.max(b).min(size);

            let read: Vec<(u64, u64)> = pieces(&segments, range.clone()).into_iter().rev().flat_map(|(id, part)| part.map(move |place| (id, place))).collect();

            prop_assert_eq!(&read[..], &whole[range.start as usize..range.end as usize]);
        }
    }
}
