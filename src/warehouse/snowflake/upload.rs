//! Bytes → an internal stage, by what PUT answered: which cloud the account lives on, where in it, and a key for an hour.
//!
//! The stage is encrypted by the cloud (`SNOWFLAKE_SSE`), so the bytes go as they are.

use std::time::Duration;

use aws_sdk_s3::{
    config::{BehaviorVersion, Credentials, Region},
    primitives::ByteStream,
};
use bytes::Bytes;
use reqwest::Client;
use serde_json::Value;

use super::error::Error;

/// One upload, however slow the line: a file is at most a few dozen MB.
const UPLOAD_MAX: Duration = Duration::from_secs(600);

pub(super) async fn upload(http: &Client, stage: &Value, name: &str, body: Bytes) -> Result<(), Error> {
    let uploading = async {
        match stage["locationType"].as_str() {
            Some("S3") => to_s3(stage, name, body).await,
            Some("AZURE") => to_azure(http, stage, name, body).await,
            Some("GCS") => to_gcs(http, stage, name, body).await,
            _ => Err(Error::Upload("the stage lies on a cloud that is not known here".to_owned())),
        }
    };
    tokio::time::timeout(UPLOAD_MAX, uploading).await.unwrap_or_else(|_| Err(Error::Upload(format!("not done within {} s", UPLOAD_MAX.as_secs()))))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str, Error> {
    value[key].as_str().ok_or_else(|| Error::Upload(format!("the stage's address lacks {key}")))
}

/// `bucket/prefix/` → the two.
fn split(location: &str) -> (&str, &str) {
    location.split_once('/').unwrap_or((location, ""))
}

async fn to_s3(stage: &Value, name: &str, body: Bytes) -> Result<(), Error> {
    let keys = &stage["creds"];
    let credentials = Credentials::new(
        text(keys, "AWS_KEY_ID")?,
        text(keys, "AWS_SECRET_KEY")?,
        keys["AWS_TOKEN"].as_str().filter(|it| !it.is_empty()).map(str::to_owned),
        None,
        "snowflake stage",
    );
    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .credentials_provider(credentials)
        .region(Region::new(text(stage, "region")?.to_owned()));
    if let Some(host) = stage["endPoint"].as_str().filter(|it| !it.is_empty()) {
        config = config.endpoint_url(format!("https://{host}"));
    }
    let (bucket, prefix) = split(text(stage, "location")?);
    let put = aws_sdk_s3::Client::from_conf(config.build()).put_object().bucket(bucket).key(format!("{prefix}{name}")).body(ByteStream::from(body));
    put.send().await.map(|_| ()).map_err(|error| Error::Upload(error.into_service_error().to_string()))
}

async fn to_azure(http: &Client, stage: &Value, name: &str, body: Bytes) -> Result<(), Error> {
    let (container, prefix) = split(text(stage, "location")?);
    let host = stage["endPoint"].as_str().filter(|it| !it.is_empty()).unwrap_or("blob.core.windows.net");
    let token = text(&stage["creds"], "AZURE_SAS_TOKEN")?.trim_start_matches('?');
    let url = format!("https://{}.{host}/{container}/{prefix}{name}?{token}", text(stage, "storageAccount")?);
    sent(http.put(url).header("x-ms-blob-type", "BlockBlob").body(body)).await
}

async fn to_gcs(http: &Client, stage: &Value, name: &str, body: Bytes) -> Result<(), Error> {
    if let Some(token) = stage["creds"]["GCS_ACCESS_TOKEN"].as_str().filter(|it| !it.is_empty()) {
        let (bucket, prefix) = split(text(stage, "location")?);
        return sent(http.put(format!("https://storage.googleapis.com/{bucket}/{prefix}{name}")).bearer_auth(token).body(body)).await;
    }
    // Signed for the one file that PUT named.
    sent(http.put(text(stage, "presignedUrl")?).body(body)).await
}

async fn sent(request: reqwest::RequestBuilder) -> Result<(), Error> {
    let answer = request.timeout(UPLOAD_MAX).send().await.map_err(|error| Error::Upload(error.without_url().to_string()))?;
    match answer.status() {
        status if status.is_success() => Ok(()),
        status => Err(Error::Upload(format!("the stage answered {status}"))),
    }
}
