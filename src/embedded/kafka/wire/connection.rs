//! One client: reads frames, has them carried out, answers in their order.
//!
//! Produce requests are put into the store's queue as they are read, so that those a client sends one behind the other
//! share one flush. Everything else begins when its turn comes.

use std::{io, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpStream, tcp::OwnedReadHalf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use super::{
    Server,
    api::{self, Answer},
};

/// Requests of one connection under way; librdkafka keeps up to five produce requests in flight.
const REQUESTS_MAX: usize = 8;
/// Bytes of requests under way per connection. One larger request may be under way alone.
const IN_FLIGHT_KIB: u32 = 8 * 1024;
/// Reserved at once for a frame; a larger one grows as its bytes really come.
const RESERVED_BYTES: usize = 4 << 20;
/// What a produce request may hold beside one largest batch: names, and other partitions' batches.
const FRAME_SLACK_BYTES: usize = 4 << 20;
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// Why a connection was closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("a frame of {0} bytes")]
    Frame(i32),
    #[error("a request that we do not serve: api {key}, version {version}")]
    Unserved { key: i16, version: i16 },
    #[error("a request that cannot be read")]
    Malformed,
    #[error("an answer that cannot be written in version {version} of api {key}")]
    Unanswerable { key: i16, version: i16 },
    #[error("a batch was refused and its producer wants no answer")]
    Unheard,
    #[error("the broker is stopping")]
    Stopping,
}

impl From<super::super::store::Closed> for Broken {
    fn from(_: super::super::store::Closed) -> Self {
        Self::Stopping
    }
}

/// Serves one client until it leaves or says something that cannot be understood.
pub(super) async fn converse(socket: TcpStream, server: Arc<Server>) -> Result<(), Broken> {
    socket.set_nodelay(true)?;
    let (incoming, mut outgoing) = socket.into_split();
    let mut incoming = BufReader::with_capacity(READ_BUFFER_BYTES, incoming);
    let (begun, mut to_answer) = mpsc::channel::<(Answer, OwnedSemaphorePermit)>(REQUESTS_MAX);
    let room = Arc::new(Semaphore::new(IN_FLIGHT_KIB as usize));
    let reading = async move {
        while let Some((frame, permit)) = next_frame(&mut incoming, &room, server.batch_bytes_max() + FRAME_SLACK_BYTES).await? {
            let answer = api::begin(&server, frame).await?;
            if begun.send((answer, permit)).await.is_err() {
                break;
            }
        }
        Ok::<(), Broken>(())
    };
    let answering = async move {
        while let Some((answer, permit)) = to_answer.recv().await {
            if let Some(bytes) = answer.await? {
                outgoing.write_all(&bytes).await?;
            }
            drop(permit);
        }
        Ok::<(), Broken>(())
    };
    tokio::try_join!(reading, answering).map(|_| ())
}

/// The next frame without its length; None when the client has left between two frames.
async fn next_frame(incoming: &mut BufReader<OwnedReadHalf>, room: &Arc<Semaphore>, bytes_max: usize) -> Result<Option<(Bytes, OwnedSemaphorePermit)>, Broken> {
    let length = match incoming.read_i32().await {
        Ok(length) => length,
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let bytes = usize::try_from(length).ok().filter(|it| (api::HEADER_BYTES_MIN..=bytes_max).contains(it)).ok_or(Broken::Frame(length))?;
    let kib = u32::try_from(bytes / 1024 + 1).unwrap_or(u32::MAX).min(IN_FLIGHT_KIB);
    let permit = Arc::clone(room).acquire_many_owned(kib).await.map_err(|_| Broken::Stopping)?;
    let mut frame = BytesMut::with_capacity(bytes.min(RESERVED_BYTES));
    while frame.len() < bytes {
        let rest = (bytes - frame.len()).min(RESERVED_BYTES);
        frame.reserve(rest);
        let wanted = u64::try_from(rest).unwrap_or(u64::MAX);
        if (&mut *incoming).take(wanted).read_buf(&mut frame).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(Some((frame.freeze(), permit)))
}
