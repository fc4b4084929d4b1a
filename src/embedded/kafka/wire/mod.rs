//! The broker's side of Kafka's protocol: sockets, frames, versions, and one file per family of requests.

mod api;
mod configs;
mod connection;
mod fetch;
mod membership;
mod produce;
mod shape;
mod topics;

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use kafka_protocol::{
    messages::{BrokerId, GroupId, TopicName},
    protocol::StrBytes,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Stats, coordinator, store};
use crate::units::Size;

/// The only broker of this cluster.
const NODE: BrokerId = BrokerId(1);
/// How long to wait after the system refused a connection (no file descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What every connection works with.
pub(super) struct Server {
    pub(super) port: u16,
    pub(super) cluster_id: String,
    pub(super) batch_bytes_max: Size,
    pub(super) store: store::Handle,
    pub(super) groups: coordinator::Handle,
    pub(super) stats: Arc<watch::Sender<Stats>>,
}

impl Server {
    fn host(&self) -> StrBytes {
        text(Ipv4Addr::LOCALHOST.to_string())
    }

    fn batch_bytes_max(&self) -> usize {
        usize::try_from(self.batch_bytes_max.0).unwrap_or(usize::MAX)
    }
}

/// Accepts connections until stopped; each is a task of its own.
pub(super) async fn serve(listener: TcpListener, server: Arc<Server>, connections_max: usize, tasks: TaskTracker, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(connections_max));
    let accepting = async {
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
                tracing::warn!(%peer, connections_max, "connection refused: too many");
                continue;
            };
            let (server, stop) = (Arc::clone(&server), stop.clone());
            tasks.spawn(async move {
                server.stats.send_modify(|it| it.connections += 1);
                let conversation = connection::converse(socket, Arc::clone(&server));
                if let Some(Err(error)) = stop.run_until_cancelled(conversation).await {
                    tracing::debug!(%peer, %error, "connection ended");
                }
                server.stats.send_modify(|it| it.connections -= 1);
                drop(place);
            });
        }
    };
    stop.run_until_cancelled(accepting).await;
}

fn text(text: impl Into<String>) -> StrBytes {
    StrBytes::from_string(text.into())
}

fn topic_name(name: &str) -> TopicName {
    TopicName(text(name))
}

fn group_id(name: &str) -> GroupId {
    GroupId(text(name))
}

/// The code of an error, 0 for none.
fn code<T>(result: &Result<T, kafka_protocol::ResponseError>) -> i16 {
    result.as_ref().err().map_or(0, kafka_protocol::ResponseError::code)
}
