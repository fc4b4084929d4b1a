//! A network between a client and a server of this machine, for bad days: slow, silent, or dead without a word.

use std::{sync::Arc, time::Duration};

use ledgerline::secret::Secret;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What happens to the bytes.
#[derive(Debug, Clone, Copy)]
struct Weather {
    /// The server's port: it is another one when a name leads to another server.
    server: u16,
    /// Nothing passes; what was sent meanwhile passes later.
    still: bool,
    /// Connections of an earlier age are forgotten: nothing of them passes ever again, and nobody is told.
    age: u64,
    /// They are hung up on towards the client, and only there.
    told: bool,
    /// Bytes a second and direction.
    rate: Option<u64>,
    /// What passes changed on its way to clients, once found whole in what was read at once: from and to, equally long.
    altered: Option<(&'static [u8], &'static [u8])>,
}

/// Ends with the runtime it was opened on.
pub(super) struct Network {
    pub(super) port: u16,
    weather: Arc<watch::Sender<Weather>>,
}

impl Network {
    /// To a port of this machine.
    pub(super) async fn to(server: u16) -> Self {
        Self::open(server, false).await
    }

    /// To a broker, which is made to say that it is found here.
    pub(super) async fn to_broker(address: &str) -> Self {
        let (_, port) = address.rsplit_once(':').expect("host:port");
        Self::open(port.parse().expect("a port"), true).await
    }

    async fn open(server: u16, is_broker: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let weather = Arc::new(watch::Sender::new(Weather { server, still: false, age: 0, told: false, rate: None, altered: None }));
        let seen = weather.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Weather { server, age, .. } = *seen.borrow();
                // A server that is down refuses, and so do we.
                let Ok(upstream) = TcpStream::connect(("127.0.0.1", server)).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), upstream.into_split());
                tokio::spawn(Pump { from: from_client, to: to_server, to_client: false, weather: seen.clone(), age, ports: None }.run());
                let ports = is_broker.then_some((server, port));
                tokio::spawn(Pump { from: from_server, to: to_client, to_client: true, weather: seen.clone(), age, ports }.run());
            }
        });
        Self { port, weather }
    }

    /// The same address, but through here.
    pub(super) fn url(&self, direct: &Secret) -> Secret {
        let mut url = url::Url::parse(direct.reveal()).expect("an address");
        url.set_port(Some(self.port)).expect("it has a port");
        Secret::new(url)
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Nothing passes any more, on connections old or new.
    pub(super) fn still(&self) {
        self.weather.send_modify(|it| it.still = true);
    }

    /// What waits passes, and what follows.
    pub(super) fn flow(&self) {
        self.weather.send_modify(|it| it.still = false);
    }

    /// Connections that are open are dead from now on, though they look alive from both ends. New ones are as good as ever.
    pub(super) fn forget(&self) {
        self.weather.send_modify(|it| it.age += 1);
    }

    /// Open connections end for their clients; their servers hear nothing of it.
    pub(super) fn hang_up_on_clients(&self) {
        self.weather.send_modify(|it| (it.age, it.told) = (it.age + 1, true));
    }

    /// The address leads to another server from now on. Open connections stay where they are.
    pub(super) fn lead_to(&self, server: u16) {
        self.weather.send_modify(|it| it.server = server);
    }

    /// Bytes are changed on their way to clients, wherever they are found.
    pub(super) fn alter(&self, change: Option<(&'static [u8], &'static [u8])>) {
        self.weather.send_modify(|it| it.altered = change);
    }

    pub(super) fn slow(&self, bytes_a_second: Option<u64>) {
        self.weather.send_modify(|it| it.rate = bytes_a_second);
    }
}

/// One direction of a connection.
struct Pump {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    to_client: bool,
    weather: watch::Receiver<Weather>,
    age: u64,
    /// A broker tells its own port; clients are to come through ours.
    ports: Option<(u16, u16)>,
}

impl Pump {
    async fn run(mut self) {
        let (age, mut weather) = (self.age, self.weather.clone());
        let told = tokio::select! {
            () = self.pass() => return,
            Ok(weather) = weather.wait_for(|it| it.age != age) => weather.told,
        };
        // Both ends stay open: a FIN would be a word.
        let Self { from, to, to_client, .. } = self;
        let _to = if told && to_client {
            drop(to);
            None
        } else {
            Some(to)
        };
        let _from = from;
        std::future::pending().await
    }

    async fn pass(&mut self) {
        while let Some(mut bytes) = self.next().await {
            let Ok(weather) = self.weather.wait_for(|it| !it.still).await.map(|it| *it) else { return };
            if let Some(rate) = weather.rate {
                tokio::time::sleep(Duration::from_micros(u64::try_from(bytes.len()).expect("small") * 1_000_000 / rate)).await;
            }
            if let Some((from, to)) = weather.altered.filter(|_| self.to_client) {
                replace(&mut bytes, from, to);
            }
            let passed = if bytes.is_empty() { self.to.shutdown().await } else { self.to.write_all(&bytes).await };
            if passed.is_err() || bytes.is_empty() {
                return;
            }
        }
    }

    /// What comes next, empty at the end; of a broker a whole answer.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let Some((server, ours)) = self.ports else {
            let mut bytes = vec![0; 16 * 1024];
            let n_bytes = self.from.read(&mut bytes).await.ok()?;
            bytes.truncate(n_bytes);
            return Some(bytes);
        };
        let mut length = [0; 4];
        if self.from.read_exact(&mut length).await.is_err() {
            return Some(Vec::new());
        }
        let mut answer = length.to_vec();
        answer.resize(4 + usize::try_from(u32::from_be_bytes(length)).expect("64 bits"), 0);
        self.from.read_exact(&mut answer[4..]).await.ok()?;
        let address = |port: u16| [b"127.0.0.1", &u32::from(port).to_be_bytes()[..]].concat();
        let (theirs, ours) = (address(server), address(ours));
        replace(&mut answer, &theirs, &ours);
        Some(answer)
    }
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let places: Vec<usize> = bytes.windows(from.len()).enumerate().filter(|(_, it)| *it == from).map(|(at, _)| at).collect();
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
}
