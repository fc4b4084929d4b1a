//! Stub.
use std::path::{Path, PathBuf};
use super::Progress;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct Error;
impl crate::fault::Diagnose for Error { fn fault(&self) -> crate::fault::Fault { crate::fault::Fault::Bug } }
pub struct Venv(PathBuf);
pub struct Found { pub path: PathBuf, pub version: String }
pub async fn find() -> Result<Found, Error> { Err(Error) }
impl Venv { pub async fn ensure(_: &Progress) -> Result<Self, Error> { Err(Error) } pub fn python(&self) -> &Path { &self.0 } pub fn postgres_bin(&self) -> &Path { &self.0 } }
