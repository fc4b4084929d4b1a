//! The bucket, by `aws-sdk-s3`: put, put if absent, get, list, delete. MinIO is S3 with another endpoint.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use aws_sdk_s3::{
    Client,
    config::{
        BehaviorVersion, Credentials, ProvideCredentials as _, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedCredentialsProvider,
        StalledStreamProtectionConfig, retry::RetryConfig, timeout::TimeoutConfig,
    },
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    primitives::ByteStream,
    types::{BucketLocationConstraint, CreateBucketConfiguration},
};
use bytes::Bytes;
use url::Url;

use super::{
    error::{Cause, Error},
    multipart,
};
use crate::secret::Secret;

/// How the bucket is reached. Without an endpoint it is AWS.
#[derive(Debug, Clone, PartialEq)]
pub struct Access {
    pub endpoint: Option<Url>,
    pub region: String,
    pub bucket: String,
    pub addressing: Addressing,
    /// Empty: credentials as AWS's SDK finds them, in the environment, a profile, or the role of the container or instance.
    pub access_key_id: String,
    pub secret_access_key: Secret,
}

/// Where the bucket's name stands in an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Addressing {
    /// As AWS wants it there, in the path elsewhere.
    #[default]
    Auto,
    /// `https://s3.example.com/lake/…`
    Path,
    /// `https://lake.s3.example.com/…`
    Virtual,
}

/// One bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pub(super) client: Client,
    pub(super) bucket: String,
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
/// Where objects lie that see whether a second write is refused, for a moment.
const CHECKS: &str = "_check/write-once-";
/// AWS names the region a bucket is really in.
const BUCKET_REGION: &str = "x-amz-bucket-region";

impl Store {
    /// Connects, creates the bucket if it is absent, and makes sure that the store honours `If-None-Match`.
    pub async fn connect(access: &Access) -> Result<Self, Error> {
        let store = Self::open(access).await?;
        store.ensure_bucket(&access.region).await?;
        store.check_write_once().await?;
        Ok(store)
    }

    /// For whoever only reads: asks the store nothing, and creates nothing.
    pub async fn open(access: &Access) -> Result<Self, Error> {
        let address = access.endpoint.as_ref().map_or_else(|| format!("AWS {}", access.region), |it| it.as_str().trim_end_matches('/').to_owned());
        Ok(Self { client: Client::from_conf(client_config(access).await?), bucket: access.bucket.clone(), address })
    }

    /// For people: where the bucket is.
    pub fn address(&self) -> String {
        format!("{}/{}", self.address, self.bucket)
    }

    /// Puts an object whose name carries its hash: writing it again changes nothing.
    pub async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        if body.len() > multipart::PART_BYTES {
            return multipart::put(self, key, body).await;
        }
        let sent = self.client.put_object().bucket(&self.bucket).key(key).body(ByteStream::from(body)).send().await;
        sent.map(|_| ()).map_err(|error| self.failed(format!("put object {key}"), error))
    }

    /// Puts an object that must not exist. Not atomic with its answer: after a lost answer the client's own retry may report
    /// `Exists` for what it wrote itself, so compare the stored bytes.
    pub async fn put_if_absent(&self, key: &str, body: Bytes) -> Result<Put, Error> {
        let sent = self.client.put_object().bucket(&self.bucket).key(key).if_none_match("*").body(ByteStream::from(body)).send().await;
        match sent {
            Ok(_) => Ok(Put::Written),
            Err(error) if status(&error) == Some(412) => Ok(Put::Exists),
            Err(error) => Err(self.failed(format!("put object {key} if absent"), error)),
        }
    }

    /// None where there is no such object.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let got = match self.client.get_object().bucket(&self.bucket).key(key).send().await {
            Ok(got) => got,
            Err(error) if error.code() == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(self.failed(format!("get object {key}"), error)),
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
        let listed = list.send().await.map_err(|error| self.failed(format!("list {prefix}"), error))?;
        let size = |bytes: Option<i64>| bytes.and_then(|it| u64::try_from(it).ok()).unwrap_or_default();
        Ok(Page {
            truncated: listed.is_truncated.unwrap_or_default(),
            objects: listed.contents.unwrap_or_default().into_iter().filter_map(|it| Some(Listed { bytes: size(it.size), key: it.key? })).collect(),
            prefixes: listed.common_prefixes.unwrap_or_default().into_iter().filter_map(|it| it.prefix).collect(),
        })
    }

    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        let sent = self.client.delete_object().bucket(&self.bucket).key(key).send().await;
        sent.map(|_| ()).map_err(|error| self.failed(format!("delete object {key}"), error))
    }

    async fn ensure_bucket(&self, region: &str) -> Result<(), Error> {
        let doing = || format!("use bucket {} at {}", self.bucket, self.address);
        match self.client.head_bucket().bucket(&self.bucket).send().await {
            Ok(_) => return Ok(()),
            Err(error) if status(&error) == Some(404) => {}
            Err(error) if matches!(status(&error), Some(301 | 307)) => {
                let found = error.raw_response().and_then(|it| it.headers().get(BUCKET_REGION)).unwrap_or("another one").to_owned();
                return Err(Error::WrongRegion { bucket: self.bucket.clone(), region: region.to_owned(), found });
            }
            Err(error) => {
                // An answer to HEAD has no body that could say which key or right is wrong; one to a listing has.
                let refused = self.failed(doing(), error);
                let asked = self.client.list_objects_v2().bucket(&self.bucket).max_keys(1).send().await;
                return Err(asked.err().map_or(refused, |error| self.failed(doing(), error)));
            }
        }
        let mut create = self.client.create_bucket().bucket(&self.bucket);
        if region != "us-east-1" {
            create =
                create.create_bucket_configuration(CreateBucketConfiguration::builder().location_constraint(BucketLocationConstraint::from(region)).build());
        }
        match create.send().await {
            Ok(_) => {
                tracing::info!(bucket = self.bucket, address = self.address, "bucket created");
                Ok(())
            }
            // Another process of ours was quicker.
            Err(error) if matches!(error.code(), Some("BucketAlreadyOwnedByYou")) => Ok(()),
            Err(error) => match self.failed(doing(), error) {
                Error::StoreRefuses { source, .. } => Err(Error::NoBucket { bucket: self.bucket.clone(), address: self.address.clone(), source }),
                away => Err(away),
            },
        }
    }

    /// Writes an object twice, each time only if it is absent. A name of this moment's own: others may be checking too.
    async fn check_write_once(&self) -> Result<(), Error> {
        static CHECK: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let key = format!("{CHECKS}{now}-{}-{}", std::process::id(), CHECK.fetch_add(1, Ordering::Relaxed));
        let body = Bytes::from_static(b"ledgerline wrote this, to see whether a second write is refused\n");
        let checked = async {
            self.put_if_absent(&key, body.clone()).await?;
            self.put_if_absent(&key, body.clone()).await
        };
        let verdict = match checked.await {
            Ok(Put::Exists) => Ok(()),
            Ok(Put::Written) => Err(Error::NotWriteOnce(self.address.clone())),
            Err(Error::StoreRefuses { source, .. }) if source.to_string().contains("NotImplemented") => Err(Error::NotWriteOnce(self.address.clone())),
            Err(error) => return Err(error),
        };
        if let Err(error) = self.delete(&key).await {
            tracing::warn!(key, error = crate::fault::chain(&error), "the object of a check stays behind, it can be deleted");
        }
        verdict
    }

    /// 4xx other than a conflict or a request to slow down is a refusal: a person must change something.
    pub(super) fn failed<E>(&self, doing: String, error: SdkError<E>) -> Error
    where
        E: std::error::Error + Send + Sync + ProvideErrorMetadata + 'static,
    {
        let status = status(&error);
        if error.code() == Some("NoSuchBucket") {
            return Error::BucketGone { bucket: self.bucket.clone(), address: self.address.clone(), doing };
        }
        let source: Cause = match (status, error.code(), error.message()) {
            (Some(status), Some(code), message) => format!("{status} {code} {}", message.unwrap_or_default()).trim_end().to_owned(),
            (Some(status), None, _) => format!("{status} from {}", self.address),
            (None, ..) if matches!(error, SdkError::DispatchFailure(_) | SdkError::TimeoutError(_)) => {
                format!("no answer from {}: {}", self.address, innermost(&error))
            }
            (None, ..) => innermost(&error),
        }
        .into();
        let refuses = matches!(status, Some(400 | 401 | 403 | 404 | 405 | 411 | 501));
        if refuses { Error::StoreRefuses { doing, source } } else { Error::StoreAway { doing, source } }
    }
}

async fn client_config(access: &Access) -> Result<aws_sdk_s3::Config, Error> {
    let path_style = match access.addressing {
        Addressing::Auto => access.endpoint.is_some(),
        Addressing::Path => true,
        Addressing::Virtual => false,
    };
    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(access.region.clone()))
        .credentials_provider(credentials(access).await?)
        .force_path_style(path_style)
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(TRY).build())
        .retry_config(RetryConfig::standard().with_max_attempts(TRIES))
        // The signature covers the body and we check SHA-256 ourselves; some stores know no newer checksums.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        // A store that flushes to a busy disk is silent for a while; the timeout above is the limit.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    config.set_endpoint_url(access.endpoint.as_ref().map(|it| it.as_str().trim_end_matches('/').to_owned()));
    Ok(config.build())
}

/// The keys that were given, or the SDK's own search. It is tried here, so that who has none hears it at once.
async fn credentials(access: &Access) -> Result<SharedCredentialsProvider, Error> {
    if !access.access_key_id.is_empty() {
        return Ok(SharedCredentialsProvider::new(Credentials::new(&access.access_key_id, access.secret_access_key.reveal(), None, None, "ledgerline")));
    }
    let found = aws_config::defaults(BehaviorVersion::latest()).region(Region::new(access.region.clone())).load().await;
    let provider = found.credentials_provider().ok_or_else(|| Error::NoCredentials("no provider of credentials".into()))?;
    provider.provide_credentials().await.map_err(|error| Error::NoCredentials(DisplayErrorContext(&error).to_string().into()))?;
    Ok(provider)
}

fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|it| it.status().as_u16())
}

/// The innermost cause: the ones around it only say that a request was not answered.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |it| it.source());
    causes.last().unwrap_or(error).to_string()
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::presigning::PresigningConfig;

    use super::*;

    /// The address of an object, as the client would ask for it.
    async fn address(endpoint: Option<&str>, addressing: Addressing) -> String {
        let access = Access {
            endpoint: endpoint.map(|it| it.parse().unwrap()),
            region: "eu-central-1".to_owned(),
            bucket: "lake".to_owned(),
            addressing,
            access_key_id: "id".to_owned(),
            secret_access_key: Secret::new("secret"),
        };
        let store = Store::open(&access).await.unwrap();
        let request = store.client.get_object().bucket("lake").key("a/b").presigned(PresigningConfig::expires_in(Duration::from_secs(60)).unwrap());
        request.await.unwrap().uri().split('?').next().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_bucket_is_addressed_by_path_or_by_host() {
        let minio = Some("http://minio.example.com:9000");
        assert_eq!(address(minio, Addressing::Auto).await, "http://minio.example.com:9000/lake/a/b");
        assert_eq!(address(minio, Addressing::Virtual).await, "http://lake.minio.example.com:9000/a/b");
        assert_eq!(address(None, Addressing::Auto).await, "https://lake.s3.eu-central-1.amazonaws.com/a/b");
        assert_eq!(address(None, Addressing::Path).await, "https://s3.eu-central-1.amazonaws.com/lake/a/b");
    }
}
