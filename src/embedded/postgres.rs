//! Stub.
use std::path::{Path, PathBuf};
use super::{Progress, Health};
use crate::secret::Secret;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct Error;
impl crate::fault::Diagnose for Error { fn fault(&self) -> crate::fault::Fault { crate::fault::Fault::Bug } }
#[derive(Debug, Default)]
pub struct Config { pub bin: PathBuf, pub dir: PathBuf, pub port: u16 }
pub struct Server(tokio::sync::watch::Receiver<Health>);
pub async fn end_orphan(_: &Path) {}
impl Server { pub async fn start(_: Config, _: &Progress) -> Result<Self, Error> { Err(Error) } pub fn url(&self, _: &str) -> Secret { Secret::default() } pub async fn stop(self) {} pub fn health(&self) -> tokio::sync::watch::Receiver<Health> { self.0.clone() } }
