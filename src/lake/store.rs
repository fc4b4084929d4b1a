//! The bucket, by `aws-sdk-s3`: put, put if absent, get, list, delete. MinIO is S3 with another endpoint.

use std::time::Duration;

use aws_sdk_s3::{
    Client,
    config::{
        BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig, retry::RetryConfig,
        timeout::TimeoutConfig,
    },
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    primitives::ByteStream,
    types::{BucketLocationConstraint, CreateBucketConfiguration},
};
use bytes::Bytes;
use url::Url;

use super::error::{Cause, Error};
use crate::secret::Secret;

/// How the bucket is reached. Without an endpoint it is AWS.
#[derive(Debug, Clone, PartialEq)]
pub struct Access {
    pub endpoint: Option<Url>,
    pub region: String,
    pub bucket: String,
    pub access_key_id: String,
    pub secret_access_key: Secret,
}

/// One bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    client: Client,
    bucket: String,
    address: String,
}

/// What became of a conditional put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    Written,
    /// An object with this key exists; it was not touched.
    Exists,
}

/// A key and the size of its object in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub bytes: u64,
}

/// A part of a listing, in the order of the keys' bytes.
#[derive(Debug, Default)]
pub struct Page {
    pub objects: Vec<Listed>,
    /// The next level of names, where a delimiter was given.
    pub prefixes: Vec<String>,
    /// There is more behind the last key.
    pub truncated: bool,
}

/// Keys of one page; S3 gives no more.
const PAGE: i32 = 1_000;
const CONNECT: Duration = Duration::from_secs(3);
/// One try of one request: the largest object over a slow line.
const TRY: Duration = Duration::from_secs(30);
/// Tries inside the client; whoever must not give up tries again around it.
const TRIES: u32 = 3;
/// Written once per bucket, to see whether a second write is refused.
const CHECK_KEY: &str = "_check/write-once";

impl Store {
    /// Connects, creates the bucket if it is absent, and makes sure that the store honours `If-None-Match`.
    pub async fn connect(access: &Access) -> Result<Self, Error> {
        let address = access.endpoint.as_ref().map_or_else(|| format!("AWS {}", access.region), |it| it.as_str().trim_end_matches('/').to_owned());
        let store = Self { client: Client::from_conf(client_config(access)), bucket: access.bucket.clone(), address };
        store.ensure_bucket(&access.region).await?;
        store.check_write_once().await?;
        Ok(store)
    }

    /// For people: where the bucket is.
    pub fn address(&self) -> String {
        format!("{}/{}", self.address, self.bucket)
    }

    /// Puts an object whose name carries its hash: writing it again changes nothing.
    pub async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        let sent = self.client.put_object().bucket(&self.bucket).key(key).body(ByteStream::from(body)).send().await;
        sent.map(|_| ()).map_err(|error| failed(format!("put object {key}"), error))
    }

    /// Puts an object that must not exist. Not atomic with its answer: after a lost answer the client's own retry may report
    /// `Exists` for what it wrote itself, so compare the stored bytes.
    pub async fn put_if_absent(&self, key: &str, body: Bytes) -> Result<Put, Error> {
        let sent = self.client.put_object().bucket(&self.bucket).key(key).if_none_match("*").body(ByteStream::from(body)).send().await;
        match sent {
            Ok(_) => Ok(Put::Written),
            Err(error) if status(&error) == Some(412) => Ok(Put::Exists),
            Err(error) => Err(failed(format!("put object {key} if absent"), error)),
        }
    }

    /// None where there is no such object.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let got = match self.client.get_object().bucket(&self.bucket).key(key).send().await {
            Ok(got) => got,
            Err(error) if error.code() == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(failed(format!("get object {key}"), error)),
        };
        let body = got.body.collect().await;
        body.map(|it| Some(it.into_bytes())).map_err(|error| Error::StoreAway { doing: format!("get object {key}"), source: error.into() })
    }

    /// The objects under a prefix whose keys sort behind `start_after`, at most `keys_max` (and at most 1,000).
    pub async fn list(&self, prefix: &str, start_after: Option<&str>, keys_max: usize) -> Result<Page, Error> {
        self.list_level(prefix, None, start_after, keys_max).await
    }

    /// The next level of names under a prefix: `_log/` → `_log/bank.transaction/`, …
    pub async fn list_prefixes(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let (mut all, mut start_after) = (Vec::new(), None::<String>);
        loop {
            let page = self.list_level(prefix, Some("/"), start_after.as_deref(), usize::MAX).await?;
            all.extend(page.prefixes);
            match all.last() {
                // Behind everything under the last prefix: `0` is the character after `/`.
                Some(last) if page.truncated => start_after = Some(format!("{}0", last.trim_end_matches('/'))),
                _ => return Ok(all),
            }
        }
    }

    async fn list_level(&self, prefix: &str, delimiter: Option<&str>, start_after: Option<&str>, keys_max: usize) -> Result<Page, Error> {
        let keys_max = i32::try_from(keys_max).unwrap_or(PAGE).clamp(1, PAGE);
        let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).max_keys(keys_max);
        let list = list.set_start_after(start_after.map(str::to_owned)).set_delimiter(delimiter.map(str::to_owned));
        let listed = list.send().await.map_err(|error| failed(format!("list {prefix}"), error))?;
        let size = |bytes: Option<i64>| bytes.and_then(|it| u64::try_from(it).ok()).unwrap_or_default();
        Ok(Page {
            truncated: listed.is_truncated.unwrap_or_default(),
            objects: listed.contents.unwrap_or_default().into_iter().filter_map(|it| Some(Listed { bytes: size(it.size), key: it.key? })).collect(),
            prefixes: listed.common_prefixes.unwrap_or_default().into_iter().filter_map(|it| it.prefix).collect(),
        })
    }

    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        let sent = self.client.delete_object().bucket(&self.bucket).key(key).send().await;
        sent.map(|_| ()).map_err(|error| failed(format!("delete object {key}"), error))
    }

    async fn ensure_bucket(&self, region: &str) -> Result<(), Error> {
        let doing = || format!("use bucket {} at {}", self.bucket, self.address);
        match self.client.head_bucket().bucket(&self.bucket).send().await {
            Ok(_) => return Ok(()),
            Err(error) if status(&error) == Some(404) => {}
            Err(error) => return Err(failed(doing(), error)),
        }
        let mut create = self.client.create_bucket().bucket(&self.bucket);
        if region != "us-east-1" {
            create =
                create.create_bucket_configuration(CreateBucketConfiguration::builder().location_constraint(BucketLocationConstraint::from(region)).build());
        }
        match create.send().await {
            Ok(_) => Ok(()),
            // Another process of ours was quicker.
            Err(error) if matches!(error.code(), Some("BucketAlreadyOwnedByYou" | "BucketAlreadyExists")) => Ok(()),
            Err(error) => Err(failed(doing(), error)),
        }
    }

    async fn check_write_once(&self) -> Result<(), Error> {
        let body = Bytes::from_static(b"ledgerline wrote this once, to see whether a second write is refused\n");
        for _ in 0..2 {
            match self.put_if_absent(CHECK_KEY, body.clone()).await {
                Ok(Put::Exists) => return Ok(()),
                Ok(Put::Written) => {}
                Err(Error::StoreRefuses { source, .. }) if source.to_string().contains("NotImplemented") => break,
                Err(error) => return Err(error),
            }
        }
        Err(Error::NotWriteOnce(self.address.clone()))
    }
}

fn client_config(access: &Access) -> aws_sdk_s3::Config {
    let credentials = Credentials::new(&access.access_key_id, access.secret_access_key.reveal(), None, None, "ledgerline");
    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(access.region.clone()))
        .credentials_provider(credentials)
        .force_path_style(true)
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(TRY).build())
        .retry_config(RetryConfig::standard().with_max_attempts(TRIES))
        // The signature covers the body and we check SHA-256 ourselves; some stores know no newer checksums.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        // A store that flushes to a busy disk is silent for a while; the timeout above is the limit.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    config.set_endpoint_url(access.endpoint.as_ref().map(|it| it.as_str().trim_end_matches('/').to_owned()));
    config.build()
}

fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|it| it.status().as_u16())
}

/// 4xx other than a conflict or a request to slow down is a refusal: a person must change something.
fn failed<E>(doing: String, error: SdkError<E>) -> Error
where
    E: std::error::Error + Send + Sync + ProvideErrorMetadata + 'static,
{
    let status = status(&error);
    let source: Cause = DisplayErrorContext(&error).to_string().lines().next().unwrap_or_default().to_owned().into();
    let source = match (status, error.code(), error.message()) {
        (Some(status), Some(code), message) => format!("{status} {code} {}", message.unwrap_or_default()).trim_end().to_owned().into(),
        _ => source,
    };
    let refuses = matches!(status, Some(400 | 401 | 403 | 404 | 405 | 411 | 501));
    if refuses { Error::StoreRefuses { doing, source } } else { Error::StoreAway { doing, source } }
}
