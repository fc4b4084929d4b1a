//! What an administrator may ask of the store: topics, partitions, configs, records to delete, groups to forget.
//!
//! The catalogue on disk changes first, then what we hold, then what readers see.

use std::{collections::BTreeMap, fs, io};

use kafka_protocol::ResponseError;

use super::{Positions, Store, Topic, catalog, now_ms, open_partitions, sync_dir, topic_dir};

impl Store {
    pub(in crate::embedded::kafka) fn create_topic(
        &mut self,
        name: &str,
        partitions: i32,
        configs: BTreeMap<String, String>,
        dry: bool,
    ) -> Result<(), ResponseError> {
        catalog::check_name(name)?;
        catalog::check_partitions(partitions)?;
        if self.topics.contains_key(name) {
            return Err(ResponseError::TopicAlreadyExists);
        }
        let limits = catalog::limits(&configs, &self.limits)?;
        if dry {
            return Ok(());
        }
        let incarnation = self.catalog.next_incarnation();
        let entry = catalog::Entry { incarnation, partitions, configs };
        let opened = open_partitions(&topic_dir(&self.dir, name, incarnation), 0..partitions);
        let partitions = opened.and_then(|it| sync_dir(&self.dir.join("logs")).map(|()| it)).map_err(|error| self.refuse(&error))?;
        self.catalog.topics.insert(name.to_owned(), entry);
        if let Err(error) = self.catalog.save(&self.dir) {
            self.catalog.topics.remove(name);
            return Err(self.refuse(&error));
        }
        self.topics.insert(name.to_owned(), Topic { limits, partitions });
        self.publish();
        Ok(())
    }

    pub(in crate::embedded::kafka) fn delete_topic(&mut self, name: &str) -> Result<(), ResponseError> {
        let entry = self.catalog.topics.remove(name).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let path = topic_dir(&self.dir, name, entry.incarnation);
        if let Err(error) = self.catalog.save(&self.dir) {
            self.catalog.topics.insert(name.to_owned(), entry);
            return Err(self.refuse(&error));
        }
        self.topics.remove(name);
        self.publish();
        self.holds.send_if_modified(|it| it.remove(name).is_some());
        let forgotten = self.offsets.forget_topic(name).and_then(|()| fs::remove_dir_all(&path));
        if let Err(error) = forgotten {
            // The topic is gone; what is left of it goes at the next start.
            tracing::warn!(%error, path = %path.display(), "could not remove all of a deleted topic");
        }
        Ok(())
    }

    pub(in crate::embedded::kafka) fn create_partitions(&mut self, name: &str, count: i32, dry: bool) -> Result<(), ResponseError> {
        catalog::check_partitions(count)?;
        let entry = self.catalog.topics.get(name).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let (incarnation, before) = (entry.incarnation, entry.partitions);
        if count <= before {
            return Err(ResponseError::InvalidPartitions);
        }
        if dry {
            return Ok(());
        }
        let fresh = open_partitions(&topic_dir(&self.dir, name, incarnation), before..count).map_err(|error| self.refuse(&error))?;
        self.change(name, |entry| entry.partitions = count)?;
        if let Some(topic) = self.topics.get_mut(name) {
            topic.partitions.extend(fresh);
        }
        self.publish();
        Ok(())
    }

    pub(in crate::embedded::kafka) fn alter_configs(
        &mut self,
        name: &str,
        change: impl FnOnce(BTreeMap<String, String>) -> BTreeMap<String, String>,
        dry: bool,
    ) -> Result<(), ResponseError> {
        let entry = self.catalog.topics.get(name).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let configs = change(entry.configs.clone());
        let limits = catalog::limits(&configs, &self.limits)?;
        if dry {
            return Ok(());
        }
        self.change(name, |entry| entry.configs = configs)?;
        if let Some(topic) = self.topics.get_mut(name) {
            topic.limits = limits;
        }
        self.publish();
        Ok(())
    }

    /// Deletes the records before `offset`; -1: all of them. Returns where the log begins now.
    pub(in crate::embedded::kafka) fn delete_records(&mut self, name: &str, partition: i32, offset: i64) -> Result<i64, ResponseError> {
        let topic = self.topics.get_mut(name).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let partition = usize::try_from(partition).ok().and_then(|it| topic.partitions.get_mut(it)).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let end = partition.view().borrow().high_watermark;
        let offset = if offset == -1 { end } else { offset };
        if !(0..=end).contains(&offset) {
            return Err(ResponseError::OffsetOutOfRange);
        }
        partition.delete_before(offset, now_ms()).map_err(|error| self.refuse(&error))
    }

    pub(in crate::embedded::kafka) fn positions(&self, group: &str) -> Positions {
        self.offsets.of_group(group).cloned().unwrap_or_default()
    }

    pub(in crate::embedded::kafka) fn groups_with_positions(&self) -> Vec<String> {
        self.offsets.groups().cloned().collect()
    }

    pub(in crate::embedded::kafka) fn forget_group(&mut self, group: &str) -> Result<bool, ResponseError> {
        if self.offsets.of_group(group).is_none() {
            return Ok(false);
        }
        self.offsets.forget_group(group).map(|()| true).map_err(|error| self.refuse(&error))
    }

    pub(in crate::embedded::kafka) fn new_producer_id(&mut self) -> Result<i64, ResponseError> {
        self.producer_ids.take().map_err(|error| self.refuse(&error))
    }

    /// Changes a topic's entry, on disk first.
    fn change(&mut self, name: &str, change: impl FnOnce(&mut catalog::Entry)) -> Result<(), ResponseError> {
        let mut fresh = self.catalog.clone();
        change(fresh.topics.get_mut(name).ok_or(ResponseError::UnknownTopicOrPartition)?);
        fresh.save(&self.dir).map_err(|error| self.refuse(&error))?;
        self.catalog = fresh;
        Ok(())
    }

    fn refuse(&self, error: &io::Error) -> ResponseError {
        self.trouble(error);
        ResponseError::KafkaStorageError
    }
}
