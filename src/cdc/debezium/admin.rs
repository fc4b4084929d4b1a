//! What an operator may ask of the connector without running the stage: how it stands, and to take it away.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    connector_of,
    rest::{Rest, Status},
    settings::{self, connector_name},
};
use crate::{
    cdc::{Config, Connector, error::Error, source::Source},
    fault::chain,
};

/// A task ends within a moment, or with its worker.
const STOP_MAX: Duration = Duration::from_secs(60);
/// A restart shows in the status at once; what still shows a failure by then has failed again.
const RESTART_SHOWN_MAX: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The connector, or why it is not known; neither where there is none.
pub(in crate::cdc) async fn look(source: &Source, config: &Config) -> (Option<Connector>, Option<String>) {
    let asked = async {
        let rest = client(source, config)?;
        let status = rest.status(connector_name(config)).await?;
        Ok::<_, Error>(status.map(|it| connector_of(&rest, connector_name(config), &it)))
    };
    match asked.await {
        Ok(connector) => (connector, None),
        Err(error) => (None, Some(chain(&error))),
    }
}

/// Stops the connector, deletes its offsets, then itself: deleted in any other order, it would leave offsets behind which the next
/// connector of its name would go on from. Returns its name if there was one.
pub(in crate::cdc) async fn remove(source: &Source, config: &Config, dry_run: bool) -> Result<Option<String>, Error> {
    let rest = client(source, config)?;
    let name = connector_name(config);
    let Some(found) = rest.settings(name).await? else { return Ok(None) };
    settings::require_ours(config, source, &found)?;
    if !dry_run {
        stand_still(&rest, name).await?;
        rest.forget_offsets(name).await?;
        rest.delete(name).await?;
        let deadline = Instant::now() + STOP_MAX;
        while rest.status(name).await?.is_some() || rest.settings(name).await?.is_some() {
            look_again(name, deadline).await?;
        }
        tracing::info!(connector = name, "connector removed");
    }
    Ok(Some(name.to_owned()))
}

pub(super) fn client(source: &Source, config: &Config) -> Result<Rest, Error> {
    Rest::new(&config.connect_url, config.connect_password.as_ref(), source.password().clone())
}

/// Stops the connector and waits until no task is left.
pub(super) async fn stand_still(rest: &Rest, name: &str) -> Result<(), Error> {
    rest.stop(name).await?;
    let deadline = Instant::now() + STOP_MAX;
    while !rest.status(name).await?.is_some_and(|it| it.connector.state == "STOPPED" && it.tasks.is_empty()) {
        look_again(name, deadline).await?;
    }
    Ok(())
}

/// Lets a connector that stands still go on, and restarts what failed before anybody looked; one that runs is left alone.
pub(super) async fn set_going(rest: &Rest, name: &str) -> Result<(), Error> {
    let status = rest.status(name).await?;
    if status.as_ref().is_none_or(Status::stands_still) {
        rest.resume(name).await?;
    }
    if status.is_none_or(|it| it.failed().is_none()) {
        return Ok(());
    }
    tracing::info!(connector = name, "it had failed before this start, and gets another try");
    rest.restart_failed(name).await?;
    // The old failure is shown until the restart begins: nobody may take it for a new one.
    let deadline = Instant::now() + RESTART_SHOWN_MAX;
    while Instant::now() < deadline && rest.status(name).await?.is_some_and(|it| it.failed().is_some()) {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Connect does everything a moment later than it says.
async fn look_again(name: &str, deadline: Instant) -> Result<(), Error> {
    if Instant::now() >= deadline {
        return Err(Error::NotStopped { connector: name.to_owned() });
    }
    tokio::time::sleep(LOOK_AGAIN).await;
    Ok(())
}
