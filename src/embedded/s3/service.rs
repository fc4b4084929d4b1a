//! S3's operations, each a few lines: read the index, or order a change and wait until it is durable.

use std::sync::Arc;

use async_trait::async_trait;
use s3s::{S3, S3Request, S3Response, S3Result, dto::*, s3_error};
use tokio::sync::{mpsc, oneshot};

use super::{
    body::{self, Keep},
    change::{Change, Condition, Outcome, Refusal},
    commit::{Base, Order},
    convert::{KeyWriter, claims, condition, from_token, give_checksums, length, now_ms, object_of, refused, timestamp},
    index::{Broken, Found, Object as Stored},
    list::{self, Page, Question},
    multipart, read,
};

/// S3's own page size.
const PAGE_MAX: i32 = 1000;

#[derive(Clone)]
pub(super) struct Service {
    pub(super) base: Arc<Base>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) region: String,
}

impl Service {
    /// Makes a change durable, or says why not.
    pub(super) async fn order(&self, change: Change) -> Outcome {
        let (answer, answered) = oneshot::channel();
        let closed = || Refusal::Broken("the server is stopping".to_owned());
        self.orders.send(Order { change, answer }).await.map_err(|_| closed())?;
        answered.await.unwrap_or_else(|_| Err(closed()))
    }

    pub(super) async fn change(&self, change: Change) -> S3Result<Option<Stored>> {
        self.order(change).await.map_err(|refusal| refused(&self.base, refusal))
    }

    /// Asks the index on a thread that may block: its pages may have to come from the disk.
    pub(super) async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Base) -> Result<T, Broken> + Send + 'static) -> S3Result<T> {
        let base = Arc::clone(&self.base);
        match tokio::task::spawn_blocking(move || question(&base)).await {
            Ok(answer) => answer.map_err(|error| s3_error!(ServiceUnavailable, "{}", crate::fault::chain(&error))),
            Err(_) => Err(s3_error!(InternalError, "a look into the index panicked")),
        }
    }

    pub(super) async fn find(&self, bucket: &str, key: &str) -> S3Result<Found> {
        let (bucket, key) = (bucket.to_owned(), key.to_owned());
        let (found, has_bucket) = self
            .ask(move |base| {
                let found = base.index.object(&bucket, &key)?;
                let has_bucket = found.is_some() || base.index.has_bucket(&bucket)?;
                Ok((found, has_bucket))
            })
            .await?;
        found.ok_or_else(|| if has_bucket { s3_error!(NoSuchKey) } else { s3_error!(NoSuchBucket) })
    }

    async fn precheck(&self, bucket: &str, key: &str, condition: &Condition) -> S3Result<()> {
        let (bucket, key) = (bucket.to_owned(), key.to_owned());
        let found = self.ask(move |base| base.index.object(&bucket, &key)).await?;
        condition.judge(found.as_ref().map(|(object, _)| object)).map_err(|refusal| refused(&self.base, refusal))
    }

    async fn list(&self, bucket: String, prefix: String, delimiter: Option<String>, after: String, limit: i32) -> S3Result<Page> {
        let limit = usize::try_from(limit).map_err(|_| s3_error!(InvalidArgument, "max-keys is negative"))?;
        let page = self
            .ask(move |base| {
                if !base.index.has_bucket(&bucket)? {
                    return Ok(None);
                }
                let reading = base.index.begin_read()?;
                let table = reading.open_table(super::index::OBJECTS)?;
                let question = Question { prefix: &prefix, delimiter: delimiter.as_deref(), after: &after, limit };
                list::page(&table, &bucket, &question).map(Some)
            })
            .await?;
        page.ok_or_else(|| s3_error!(NoSuchBucket))
    }
}

#[async_trait]
impl S3 for Service {
    async fn create_bucket(&self, request: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        let bucket = request.input.bucket;
        let location = Some(format!("/{bucket}"));
        self.change(Change::CreateBucket { bucket, now_ms: now_ms() }).await?;
        Ok(S3Response::new(CreateBucketOutput { location }))
    }

    async fn delete_bucket(&self, request: S3Request<DeleteBucketInput>) -> S3Result<S3Response<DeleteBucketOutput>> {
        self.change(Change::DeleteBucket { bucket: request.input.bucket }).await?;
        Ok(S3Response::new(DeleteBucketOutput::default()))
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        let bucket = request.input.bucket;
        if !self.ask(move |base| base.index.has_bucket(&bucket)).await? {
            return Err(s3_error!(NoSuchBucket));
        }
        Ok(S3Response::new(HeadBucketOutput { bucket_region: Some(self.region.clone()), ..Default::default() }))
    }

    async fn get_bucket_location(&self, request: S3Request<GetBucketLocationInput>) -> S3Result<S3Response<GetBucketLocationOutput>> {
        let bucket = request.input.bucket;
        if !self.ask(move |base| base.index.has_bucket(&bucket)).await? {
            return Err(s3_error!(NoSuchBucket));
        }
        // S3 says nothing for its first region.
        let location = Some(self.region.clone()).filter(|it| it != "us-east-1").map(BucketLocationConstraint::from);
        Ok(S3Response::new(GetBucketLocationOutput { location_constraint: location }))
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let buckets = self.ask(|base| base.index.buckets()).await?;
        let buckets = buckets.into_iter().map(|(name, created)| Bucket { name: Some(name), creation_date: Some(timestamp(created)), ..Default::default() });
        Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets.collect()), ..Default::default() }))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let claims = claims!(request);
        let input = request.input;
        let condition = condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
        // A refusal known beforehand spares the disk; the one that counts is made at the commit.
        if condition != Condition::None
            && let Err(refusal) = self.precheck(&input.bucket, &input.key, &condition).await
        {
            body::discard(input.body).await;
            return Err(refusal);
        }
        let received = body::receive(&self.base, input.body, claims, Keep::SmallInIndex).await?;
        let object = object_of(&received, input.content_type, input.content_encoding, input.metadata);
        let change = Change::Put { bucket: input.bucket, key: input.key, object, body: received.body, condition };
        let stored = self.change(change).await?.ok_or_else(|| s3_error!(InternalError))?;
        let mut output = PutObjectOutput { e_tag: Some(ETag::Strong(stored.etag)), ..Default::default() };
        give_checksums!(output, stored.checksums);
        Ok(S3Response::new(output))
    }

    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        multipart::copy(self, request.input).await.map(S3Response::new)
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = request.input;
        let (stored, _) = self.find(&input.bucket, &input.key).await?;
        read::judge(&stored.etag, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let mut output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(stored.size)),
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(timestamp(stored.modified_ms)),
            content_type: stored.content_type,
            content_encoding: stored.content_encoding,
            metadata: Some(stored.metadata.into_iter().collect()),
            ..Default::default()
        };
        if input.checksum_mode.is_some() {
            give_checksums!(output, stored.checksums);
        }
        Ok(S3Response::new(output))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        read::get(self, request.input).await.map(S3Response::new)
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        let condition = condition(None, input.if_match.as_ref())?;
        self.change(Change::Delete { bucket: input.bucket, key: input.key, condition }).await?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(&self, request: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let S3Request { input: DeleteObjectsInput { bucket, delete, .. }, .. } = request;
        if delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML, "more than 1,000 keys"));
        }
        let changes = delete.objects.into_iter().map(|it| {
            let condition = it.e_tag.as_ref().and_then(ETag::as_strong).map_or(Condition::None, |etag| Condition::Etag(etag.to_owned()));
            let (service, bucket, key) = (self, bucket.clone(), it.key);
            async move { (key.clone(), service.order(Change::Delete { bucket, key, condition }).await) }
        });
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for (key, outcome) in futures_util::future::join_all(changes).await {
            match outcome {
                Ok(_) if delete.quiet == Some(true) => {}
                Ok(_) => deleted.push(DeletedObject { key: Some(key), ..Default::default() }),
                Err(Refusal::NoSuchBucket) => return Err(s3_error!(NoSuchBucket)),
                Err(refusal) => {
                    let error = refused(&self.base, refusal);
                    errors.push(Error {
                        key: Some(key),
                        code: Some(error.code().as_str().to_owned()),
                        message: error.message().map(str::to_owned),
                        ..Default::default()
                    });
                }
            }
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), errors: Some(errors), ..Default::default() }))
    }

    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let max_keys = input.max_keys.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let after = match &input.continuation_token {
            Some(token) => from_token(token)?,
            None => input.start_after.clone().unwrap_or_default(),
        };
        let page = self.list(input.bucket.clone(), input.prefix.clone().unwrap_or_default(), input.delimiter.clone(), after, max_keys).await?;
        let write = KeyWriter::new(input.encoding_type.as_ref());
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix.as_deref().map(|it| write.key(it)),
            delimiter: input.delimiter.as_deref().map(|it| write.key(it)),
            start_after: input.start_after.as_deref().map(|it| write.key(it)),
            encoding_type: input.encoding_type.clone(),
            max_keys: Some(max_keys),
            key_count: i32::try_from(page.objects.len() + page.prefixes.len()).ok(),
            continuation_token: input.continuation_token,
            is_truncated: Some(page.more_after.is_some()),
            next_continuation_token: page.more_after.as_ref().map(hex::encode),
            common_prefixes: Some(write.prefixes(page.prefixes)),
            contents: Some(write.objects(page.objects)),
            ..Default::default()
        }))
    }

    async fn list_objects(&self, request: S3Request<ListObjectsInput>) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = request.input;
        let max_keys = input.max_keys.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let after = input.marker.clone().unwrap_or_default();
        let page = self.list(input.bucket.clone(), input.prefix.clone().unwrap_or_default(), input.delimiter.clone(), after, max_keys).await?;
        let write = KeyWriter::new(input.encoding_type.as_ref());
        Ok(S3Response::new(ListObjectsOutput {
            name: Some(input.bucket),
            prefix: input.prefix.as_deref().map(|it| write.key(it)),
            delimiter: input.delimiter.as_deref().map(|it| write.key(it)),
            marker: input.marker.as_deref().map(|it| write.key(it)),
            encoding_type: input.encoding_type.clone(),
            max_keys: Some(max_keys),
            is_truncated: Some(page.more_after.is_some()),
            next_marker: page.more_after.as_deref().map(|it| write.key(it)),
            common_prefixes: Some(write.prefixes(page.prefixes)),
            contents: Some(write.objects(page.objects)),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(&self, request: S3Request<CreateMultipartUploadInput>) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        multipart::begin(self, request.input).await.map(S3Response::new)
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let claims = claims!(request);
        multipart::put_part(self, request.input, claims).await.map(S3Response::new)
    }

    async fn complete_multipart_upload(&self, request: S3Request<CompleteMultipartUploadInput>) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        multipart::complete(self, request.input).await.map(S3Response::new)
    }

    async fn abort_multipart_upload(&self, request: S3Request<AbortMultipartUploadInput>) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.change(Change::AbortUpload { id: request.input.upload_id }).await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_parts(&self, request: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        multipart::list_parts(self, request.input).await.map(S3Response::new)
    }

    async fn list_multipart_uploads(&self, request: S3Request<ListMultipartUploadsInput>) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        multipart::list_uploads(self, request.input).await.map(S3Response::new)
    }
}
