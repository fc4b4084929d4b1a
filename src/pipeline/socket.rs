//! Snapshots and commands over a Unix socket: how `attach` and single commands reach the pipeline that owns a data dir.
//!
//! One JSON document a line, both ways. The socket lies in the data dir and only its user may connect.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    Commander,
    command::{Command, Reply},
    services::Printed,
    snapshot::Snapshot,
};

/// A request is a short line; anything longer is not ours.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
enum Request {
    /// Every snapshot from now on, one a line, until the client hangs up.
    Watch,
    /// The addresses and credentials of the services in use.
    Services,
    Do {
        what: Command,
    },
}

/// Answers clients until `stop`; then the socket is gone.
pub(super) fn serve(path: &Path, commander: Commander, snapshots: watch::Receiver<Arc<Snapshot>>, printed: Printed, stop: CancellationToken) -> io::Result<()> {
    // Only the owner of the data dir gets here, so a socket that lies there is a dead one's.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let path = path.to_owned();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let (commander, snapshots, printed, stop) = (commander.clone(), snapshots.clone(), printed.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    outcome = answer(stream, commander, snapshots, printed) => {
                        if let Err(error) = outcome {
                            debug!(%error, "a client of the control socket left");
                        }
                    }
                }
            });
        }
        let _ = std::fs::remove_file(&path);
    });
    Ok(())
}

async fn answer(stream: UnixStream, commander: Commander, mut snapshots: watch::Receiver<Arc<Snapshot>>, printed: Printed) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(tokio::io::AsyncReadExt::take(reader, REQUEST_BYTES_MAX));
    let mut line = String::new();
    while reader.read_line(&mut line).await? > 0 {
        match serde_json::from_str(&line) {
            Ok(Request::Watch) => loop {
                let snapshot = Arc::clone(&snapshots.borrow_and_update());
                write_line(&mut writer, snapshot.as_ref()).await?;
                if snapshots.changed().await.is_err() {
                    return Ok(());
                }
            },
            Ok(Request::Services) => write_line(&mut writer, &printed).await?,
            Ok(Request::Do { what }) => write_line(&mut writer, &commander.ask(what).await).await?,
            Err(error) => write_line(&mut writer, &Reply::refused(format!("not a request: {error}"))).await?,
        }
        line.clear();
        reader.get_mut().set_limit(REQUEST_BYTES_MAX);
    }
    Ok(())
}

async fn write_line<W: tokio::io::AsyncWrite + Unpin>(writer: &mut W, document: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(document).map_err(io::Error::other)?;
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}

/// A client of the pipeline that owns a data dir.
pub struct Client {
    reader: BufReader<Box<dyn AsyncRead + Send + Unpin>>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Client {
    /// None where no pipeline runs on this data dir.
    pub async fn connect(path: &Path) -> Option<Self> {
        let (reader, writer) = UnixStream::connect(path).await.ok()?.into_split();
        Some(Self { reader: BufReader::new(Box::new(reader)), writer })
    }

    pub async fn ask(&mut self, what: Command) -> io::Result<Reply> {
        self.request(&Request::Do { what }).await?;
        self.next().await
    }

    pub async fn services(&mut self) -> io::Result<Printed> {
        self.request(&Request::Services).await?;
        self.next().await
    }

    /// Snapshots as they come, until either side ends. The client is used up: it can only watch from now on.
    pub async fn watch(mut self) -> io::Result<(watch::Receiver<Arc<Snapshot>>, tokio::task::JoinHandle<()>)> {
        self.request(&Request::Watch).await?;
        let first: Snapshot = self.next().await?;
        let (sender, receiver) = watch::channel(Arc::new(first));
        let reading = tokio::spawn(async move {
            while let Ok(snapshot) = self.next().await {
                sender.send_replace(Arc::new(snapshot));
            }
        });
        Ok((receiver, reading))
    }

    async fn request(&mut self, request: &Request) -> io::Result<()> {
        write_line(&mut self.writer, request).await
    }

    async fn next<T: serde::de::DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pipeline ended"));
        }
        serde_json::from_str(&line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
