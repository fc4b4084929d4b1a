//! Large objects go up in parts: a part that fails is sent again alone, and no single request has to carry the whole.

use aws_sdk_s3::{
    primitives::ByteStream,
    types::{CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::{error::Error, store::Store};

/// An object larger than one part goes up in parts of this size. S3 takes no part below 5 MiB but the last.
pub(super) const PART_BYTES: usize = 16 << 20;
/// Parts of one object on their way at the same time.
const PARTS_AT_ONCE: usize = 3;

/// Puts an object part by part. It appears when the last part is there, as a whole; after an error there is nothing.
pub(super) async fn put(store: &Store, key: &str, body: Bytes) -> Result<(), Error> {
    let begun = store.client.create_multipart_upload().bucket(&store.bucket).key(key).send().await;
    let begun = begun.map_err(|error| store.failed(format!("begin the upload of object {key}"), error))?;
    let upload_id = begun.upload_id.unwrap_or_default();
    let put = put_parts(store, key, &upload_id, body).await;
    if put.is_err() {
        // Its parts cost money until somebody aborts it; a rule of the bucket's life cycle is the second net.
        let aborted = store.client.abort_multipart_upload().bucket(&store.bucket).key(key).upload_id(&upload_id).send().await;
        if let Err(error) = aborted {
            tracing::warn!(key, error = %store.failed("abort an upload".to_owned(), error), "parts of an object stay behind");
        }
    }
    put
}

async fn put_parts(store: &Store, key: &str, upload_id: &str, body: Bytes) -> Result<(), Error> {
    let starts = (0..body.len()).step_by(PART_BYTES);
    let parts = (1..).zip(starts.map(|start| body.slice(start..body.len().min(start + PART_BYTES))));
    let sending = parts.map(|(number, part)| async move {
        let sent = store.client.upload_part().bucket(&store.bucket).key(key).upload_id(upload_id).part_number(number).body(ByteStream::from(part)).send();
        let sent = sent.await.map_err(|error| store.failed(format!("put part {number} of object {key}"), error))?;
        Ok::<_, Error>(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build())
    });
    let parts: Vec<CompletedPart> = futures_util::stream::iter(sending).buffered(PARTS_AT_ONCE).try_collect().await?;
    let whole = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
    let completed = store.client.complete_multipart_upload().bucket(&store.bucket).key(key).upload_id(upload_id).multipart_upload(whole).send().await;
    completed.map(drop).map_err(|error| store.failed(format!("complete object {key}"), error))
}
