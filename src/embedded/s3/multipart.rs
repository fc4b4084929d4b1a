//! Objects in parts, and copies: both arrange bytes that are already on the disk. Uploads survive a restart.

use s3s::{S3Result, dto::*, s3_error};

use super::{
    body::{self, Claims, Keep},
    change::{Body, Change},
    convert::{condition, full, give_checksums, length, now_ms, on_disk, timestamp},
    index::{Place, Segment, Upload},
    read,
    service::Service,
};

/// S3's own limit.
const PARTS_MAX: u16 = 10_000;

pub(super) async fn begin(service: &Service, input: CreateMultipartUploadInput) -> S3Result<CreateMultipartUploadOutput> {
    let id = crate::embedded::random_hex(16).map_err(|error| s3_error!(InternalError, "{error}"))?;
    let upload = Upload {
        bucket: input.bucket.clone(),
        key: input.key.clone(),
        started_ms: now_ms(),
        content_type: input.content_type,
        content_encoding: input.content_encoding,
        metadata: input.metadata.unwrap_or_default().into_iter().collect(),
    };
    service.change(Change::BeginUpload { id: id.clone(), upload }).await?;
    Ok(CreateMultipartUploadOutput { bucket: Some(input.bucket), key: Some(input.key), upload_id: Some(id), ..Default::default() })
}

pub(super) async fn put_part(service: &Service, input: UploadPartInput, claims: Claims) -> S3Result<UploadPartOutput> {
    let number = u16::try_from(input.part_number).ok().filter(|it| (1..=PARTS_MAX).contains(it));
    let number = number.ok_or_else(|| s3_error!(InvalidArgument, "part numbers are 1 to 10,000"))?;
    // Spares the disk a part nobody waits for; the commit looks again.
    if let Err(refusal) = expect_upload(service, &input.upload_id, &input.bucket, &input.key).await {
        body::discard(input.body).await;
        return Err(refusal);
    }
    let received = body::receive(&service.base, input.body, claims, Keep::AlwaysAFile).await?;
    let Body::Files(mut drafts) = received.body else { return Err(s3_error!(InternalError)) };
    let draft = drafts.pop().ok_or_else(|| s3_error!(InternalError))?;
    let part =
        super::index::Part { etag: received.md5.clone(), size: received.size, id: draft.id, modified_ms: now_ms(), checksums: received.checksums.clone() };
    service.change(Change::PutPart { id: input.upload_id, number, part, draft }).await?;
    let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(received.md5)), ..Default::default() };
    give_checksums!(output, received.checksums);
    Ok(output)
}

pub(super) async fn complete(service: &Service, input: CompleteMultipartUploadInput) -> S3Result<CompleteMultipartUploadOutput> {
    expect_upload(service, &input.upload_id, &input.bucket, &input.key).await?;
    let condition = condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
    let mut wanted = Vec::new();
    for part in input.multipart_upload.and_then(|it| it.parts).unwrap_or_default() {
        let number = part.part_number.and_then(|it| u16::try_from(it).ok());
        match (number, part.e_tag) {
            (Some(number), Some(etag)) => wanted.push((number, etag.value().to_owned())),
            _ => return Err(s3_error!(MalformedXML, "a part needs its number and its etag")),
        }
    }
    let change = Change::CompleteUpload { id: input.upload_id, wanted, condition, now_ms: now_ms() };
    let stored = service.change(change).await?.ok_or_else(|| s3_error!(InternalError))?;
    Ok(CompleteMultipartUploadOutput {
        location: Some(format!("/{}/{}", input.bucket, input.key)),
        bucket: Some(input.bucket),
        key: Some(input.key),
        e_tag: Some(ETag::Strong(stored.etag)),
        ..Default::default()
    })
}

pub(super) async fn list_parts(service: &Service, input: ListPartsInput) -> S3Result<ListPartsOutput> {
    expect_upload(service, &input.upload_id, &input.bucket, &input.key).await?;
    let limit = usize::try_from(input.max_parts.unwrap_or(1000)).unwrap_or(0).min(1000);
    let after = u16::try_from(input.part_number_marker.unwrap_or(0)).unwrap_or(0);
    let id = input.upload_id.clone();
    let mut parts = service.ask(move |base| base.index.parts(&id, after, limit + 1)).await?;
    let truncated = parts.len() > limit;
    parts.truncate(limit);
    let next = parts.last().map(|(number, _)| i32::from(*number));
    let part = |(number, part): (u16, super::index::Part)| {
        let mut output = Part {
            part_number: Some(i32::from(number)),
            e_tag: Some(ETag::Strong(part.etag)),
            size: Some(length(part.size)),
            last_modified: Some(timestamp(part.modified_ms)),
            ..Default::default()
        };
        give_checksums!(output, part.checksums);
        output
    };
    Ok(ListPartsOutput {
        bucket: Some(input.bucket),
        key: Some(input.key),
        upload_id: Some(input.upload_id),
        part_number_marker: input.part_number_marker,
        max_parts: i32::try_from(limit).ok(),
        is_truncated: Some(truncated),
        next_part_number_marker: next.filter(|_| truncated),
        parts: Some(parts.into_iter().map(part).collect()),
        ..Default::default()
    })
}

/// Every open upload of the bucket below the prefix. Abandoned ones are swept at start, so they are few: one page.
pub(super) async fn list_uploads(service: &Service, input: ListMultipartUploadsInput) -> S3Result<ListMultipartUploadsOutput> {
    let prefix = input.prefix.clone().unwrap_or_default();
    let mut uploads = service.ask(|base| base.index.uploads()).await?;
    uploads.retain(|(_, it)| it.bucket == input.bucket && it.key.starts_with(&prefix));
    uploads.sort_by(|(id, one), (other_id, other)| (&one.key, id).cmp(&(&other.key, other_id)));
    let upload = |(id, it): (String, Upload)| MultipartUpload {
        upload_id: Some(id),
        key: Some(it.key),
        initiated: Some(timestamp(it.started_ms)),
        ..Default::default()
    };
    Ok(ListMultipartUploadsOutput {
        bucket: Some(input.bucket),
        prefix: input.prefix,
        is_truncated: Some(false),
        uploads: Some(uploads.into_iter().map(upload).collect()),
        ..Default::default()
    })
}

/// A second name for the same bytes: blob files are linked, not copied.
pub(super) async fn copy(service: &Service, input: CopyObjectInput) -> S3Result<CopyObjectOutput> {
    let CopySource::Bucket { bucket, key, .. } = &input.copy_source else {
        return Err(s3_error!(NotImplemented, "a copy needs a bucket and a key as its source"));
    };
    let (mut stored, small) = service.find(bucket, key).await?;
    read::judge(&stored.etag, input.copy_source_if_match.as_ref(), input.copy_source_if_none_match.as_ref())?;
    if input.metadata_directive.as_ref().is_some_and(|it| it.as_str() == MetadataDirective::REPLACE) {
        stored.metadata = input.metadata.unwrap_or_default().into_iter().collect();
        stored.content_type = input.content_type;
        stored.content_encoding = input.content_encoding;
    }
    stored.modified_ms = now_ms();
    let body = match (&mut stored.place, small) {
        (Place::Small(_), bytes) => Body::Small(bytes.unwrap_or_default().into()),
        (Place::Files(segments), _) => {
            if !service.base.has_room() {
                return Err(full(&service.base));
            }
            let (base, old) = (std::sync::Arc::clone(&service.base), segments.clone());
            let links = move || old.iter().map(|it| base.blobs.link(it.id)).collect::<std::io::Result<Vec<_>>>();
            let drafts = tokio::task::spawn_blocking(links).await.map_err(|_| s3_error!(InternalError))?.map_err(|error| on_disk(&service.base, &error))?;
            *segments = drafts.iter().zip(segments.iter()).map(|(draft, old)| Segment { id: draft.id, size: old.size }).collect();
            Body::Files(drafts)
        }
    };
    let change = Change::Put { bucket: input.bucket, key: input.key, object: stored, body, condition: super::change::Condition::None };
    let stored = service.change(change).await?.ok_or_else(|| s3_error!(InternalError))?;
    let result = CopyObjectResult { e_tag: Some(ETag::Strong(stored.etag)), last_modified: Some(timestamp(stored.modified_ms)), ..Default::default() };
    Ok(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() })
}

async fn expect_upload(service: &Service, id: &str, bucket: &str, key: &str) -> S3Result<()> {
    let id = id.to_owned();
    match service.ask(move |base| base.index.upload(&id)).await? {
        Some(upload) if upload.bucket == bucket && upload.key == key => Ok(()),
        _ => Err(s3_error!(NoSuchUpload)),
    }
}
