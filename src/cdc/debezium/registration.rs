//! The connector as `[cdc]` says it: found, judged, then made, or brought up to date where it differs. For a start, and for `cdc apply`.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use super::{
    admin::{self, stand_still},
    rest::{Rest, Settings},
    settings::{self, connector_name},
};
use crate::{
    cdc::{
        Config,
        admin::ConnectorStep,
        error::Error,
        progress::{Progress, Store},
        slot::{self, Slot},
        source::Source,
    },
    change::TableId,
};

/// How to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cdc) enum Start {
    /// There is nothing yet: a new connector makes slot and snapshot.
    Fresh,
    /// The connector is there and its snapshot is not finished.
    UnderWay,
    /// The snapshot was taken.
    Resume,
}

/// What there is before anything is made.
pub(in crate::cdc) struct Found {
    pub(in crate::cdc) start: Start,
    slot: Option<Slot>,
    registered: Option<Settings>,
}

/// Registers one connector.
pub(in crate::cdc) struct Registrar<'a> {
    pub(super) rest: Rest,
    pub(super) source: &'a Source,
    pub(super) config: &'a Config,
}

impl<'a> Registrar<'a> {
    pub(in crate::cdc) fn new(source: &'a Source, config: &'a Config) -> Result<Self, Error> {
        Ok(Self { rest: admin::client(source, config)?, source, config })
    }

    fn name(&self) -> &'a str {
        connector_name(self.config)
    }

    /// Refuses a Kafka Connect that could not run the connector, before anything else is asked.
    pub(in crate::cdc) async fn require_plugin(&self) -> Result<(), Error> {
        let version = settings::require_plugin(&self.rest).await?;
        tracing::debug!(version, "Kafka Connect has the connector's plugin");
        Ok(())
    }

    /// Looks at the connector beside its slot, and refuses what a start would.
    pub(in crate::cdc) async fn look(&self, slot: Option<Slot>, progress: Option<&Progress>) -> Result<Found, Error> {
        let registered = self.rest.settings(self.name()).await?;
        if let Some(registered) = &registered {
            settings::require_ours(self.config, self.source, registered)?;
        }
        let start = self.decide(registered.as_ref(), slot.as_ref(), progress)?;
        Ok(Found { start, slot, registered })
    }

    /// What connector, slot and progress say together. Anything that would be a silent gap is an error.
    fn decide(&self, registered: Option<&Settings>, slot: Option<&Slot>, progress: Option<&Progress>) -> Result<Start, Error> {
        let name = &self.config.slot;
        if let Some(slot) = slot {
            slot::require_ours(name, &self.source.database, slot)?;
        }
        let Some(progress) = progress else {
            return match (registered, slot) {
                (Some(_), _) => Err(Error::ConnectorUnknown { connector: self.name().to_owned() }),
                (None, Some(_)) => Err(Error::SlotUnknown { slot: name.clone() }),
                (None, None) => Ok(Start::Fresh),
            };
        };
        let finished = progress.finished_at.is_some();
        if finished && progress.slot != *name {
            return Err(Error::SlotForeign { slot: name.clone(), reason: format!("this capture belongs to slot {}", progress.slot) });
        }
        match (finished, slot, registered) {
            (true, None, _) => Err(Error::SlotMissing { slot: progress.slot.clone() }),
            (true, Some(slot), _) => slot::require_alive(name, slot).map(|()| Start::Resume),
            (false, _, Some(_)) => Ok(Start::UnderWay),
            // It ended between the note that it begins and the registration, or somebody deleted the connector meanwhile.
            (false, _, None) => Ok(Start::Fresh),
        }
    }

    /// What [`Self::register`] would do. Kafka Connect is asked whether it would take the settings.
    pub(in crate::cdc) async fn rehearse(&self, found: &Found, tables: &BTreeSet<TableId>) -> Result<ConnectorStep, Error> {
        self.judge(found, &settings::wanted(self.config, self.source, tables)?).await
    }

    async fn judge(&self, found: &Found, wanted: &Settings) -> Result<ConnectorStep, Error> {
        let step = match &found.registered {
            None => ConnectorStep::Registered,
            Some(registered) => match settings::differences(registered, wanted) {
                differing if differing.is_empty() => return Ok(ConnectorStep::Kept),
                settings => ConnectorStep::Updated { settings },
            },
        };
        self.rest.validate(self.name(), wanted).await?;
        Ok(step)
    }

    /// Makes the connector, stopped, or brings it up to date where it differs.
    pub(in crate::cdc) async fn register(
        &self,
        connection: &mut PgConnection,
        store: &mut Store,
        found: &Found,
        tables: &BTreeSet<TableId>,
    ) -> Result<ConnectorStep, Error> {
        let wanted = settings::wanted(self.config, self.source, tables)?;
        let step = self.judge(found, &wanted).await?;
        match &step {
            ConnectorStep::Kept => {}
            ConnectorStep::Updated { settings } => {
                self.rest.update(self.name(), &wanted).await?;
                tracing::info!(connector = self.name(), settings = settings.join(", "), "the connector's settings were brought up to date");
            }
            ConnectorStep::Registered => self.create(connection, store, found, &wanted).await?,
        }
        Ok(step)
    }

    async fn create(&self, connection: &mut PgConnection, store: &mut Store, found: &Found, wanted: &Settings) -> Result<(), Error> {
        if found.start == Start::Fresh {
            if found.slot.is_some() {
                tracing::warn!(slot = self.config.slot, "the snapshot was cut short, starting over");
                slot::drop_slot(connection, &self.config.slot).await?;
            }
            store.begin(&self.config.slot).await?;
        }
        self.rest.create_stopped(self.name(), wanted).await?;
        if found.start == Start::Fresh {
            // A connector of this name may have lived before; its offsets speak of a slot that is gone.
            stand_still(&self.rest, self.name()).await?;
            self.rest.forget_offsets(self.name()).await?;
        }
        tracing::info!(connector = self.name(), "the connector is registered");
        Ok(())
    }
}
