//! What can fail in the lake, and what to do about it.

use rdkafka::error::KafkaError;

use super::object::ForeignKey;
use crate::{
    fault::{Diagnose, Fault},
    stream::consumer::Ended,
};

/// A failure of the object store, whatever its client calls it.
pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not {doing}")]
    StoreAway {
        doing: String,
        #[source]
        source: Cause,
    },
    #[error("the object store refuses to {doing}")]
    StoreRefuses {
        doing: String,
        #[source]
        source: Cause,
    },
    #[error("the object store at {0} does not honour If-None-Match, so two writers could overwrite each other's commit records")]
    NotWriteOnce(String),
    #[error("bucket {bucket} does not exist at {address}, and may not be created")]
    NoBucket {
        bucket: String,
        address: String,
        #[source]
        source: Cause,
    },
    #[error("bucket {bucket} at {address} is gone, and the lake with it: could not {doing}")]
    BucketGone { bucket: String, address: String, doing: String },
    #[error("bucket {bucket} is not in region {region}: {found}")]
    WrongRegion { bucket: String, region: String, found: String },
    #[error("found no credentials for AWS")]
    NoCredentials(#[source] Cause),
    #[error("object {0} is missing")]
    Missing(String),
    #[error("object {key} is not what its commit record says: {what}")]
    Damaged { key: String, what: String },
    #[error("commit record {key} cannot be read")]
    UnreadableCommitRecord {
        key: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("commit record {key} does not continue the one before it")]
    BrokenChain { key: String },
    #[error("a foreign object lies among the commit records")]
    ForeignKey(#[from] ForeignKey),
    #[error("could not speak to Kafka")]
    Kafka(#[from] KafkaError),
    #[error("could not write dead letters to {topic}")]
    DeadLetters {
        topic: String,
        #[source]
        source: KafkaError,
    },
    #[error("lane {lane} is stopped: {why}")]
    LaneStopped { lane: String, why: String, remedy: String },
    #[error("could not encode records")]
    Encode(#[source] Cause),
    #[error(transparent)]
    ConsumerEnded(#[from] Ended),
    #[error("a task of the lake ended early")]
    TaskEnded(#[from] tokio::task::JoinError),
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::StoreAway { .. } | Self::Kafka(_) | Self::DeadLetters { .. } => Fault::Transient,
            Self::StoreRefuses { .. } => {
                Fault::Operator("check lake.bucket and lake.region, and that LEDGERLINE__LAKE__ACCESS_KEY_ID and LEDGERLINE__LAKE__SECRET_ACCESS_KEY (on AWS without them: the profile or role) may read and write the bucket".into())
            }
            Self::NoBucket { bucket, .. } => {
                Fault::Operator(format!("create it (aws s3 mb s3://{bucket}), allow s3:CreateBucket, or correct lake.bucket"))
            }
            Self::BucketGone { .. } => Fault::Operator(
                "bring it back with what it held (from its versions or a copy): an empty one of that name lacks what was landed, and `ledgerline lake verify` names it".into(),
            ),
            Self::WrongRegion { found, .. } => Fault::Operator(format!("set lake.region to the bucket's own: {found}")),
            Self::NoCredentials(_) => Fault::Operator(
                "set LEDGERLINE__LAKE__ACCESS_KEY_ID and LEDGERLINE__LAKE__SECRET_ACCESS_KEY, or AWS_PROFILE, or give the container or instance a role".into(),
            ),
            Self::NotWriteOnce(_) => Fault::Operator("use a store with conditional writes: AWS S3, MinIO of 2024-08 or newer, or lake.endpoint = \"embedded\"".into()),
            Self::LaneStopped { remedy, .. } => Fault::Operator(remedy.clone()),
            Self::Missing(_) | Self::Damaged { .. } | Self::UnreadableCommitRecord { .. } | Self::BrokenChain { .. } | Self::ForeignKey(_) => {
                Fault::Data("run `ledgerline lake verify`: it lists everything that is wrong; restore the named objects from a copy of the bucket".into())
            }
            Self::Encode(_) | Self::ConsumerEnded(_) | Self::TaskEnded(_) => Fault::Bug,
        }
    }
}
