//! A realtime banking data pipeline, run and watched from a terminal.
//!
//! ```text
//!  bank ──► PostgreSQL ──WAL──► cdc ──► Kafka ──► lake ──► S3 ──► warehouse ──► dbt ──► kpi
//!                                                                     └── dag + refresh run these ──┘
//! ```
//!
//! Each room turns one thing into the next and owns its state alone. Data flows downstream, snapshots flow up to the
//! front ends, commands flow down; the only backward arrow is an acknowledgement, one per stage, sent after the data is
//! durable. A crash therefore repeats work and never loses it, and every stage makes a repeat harmless.
//!
//! # Words
//! One word per idea, the field's own where it has one:
//! *lane* a topic and partition · *record* one Kafka message · *object* one file in the lake · *commit record* the moment an
//! object's records exist · *boundary* BEGIN or END of a source transaction · *cut* the longest prefix of whole transactions ·
//! *stage* a long-lived task of ours · *room* a module of this tree · *DAG, task, run, try* as in Airflow · *model, snapshot,
//! test* as in dbt.

/// For the whole process, librdkafka's messages above all: they are made by one thread and freed by another, where glibc's takes locks.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub mod fault;
pub mod latency;
pub mod secret;
pub mod stage;
pub mod units;

pub mod change;

pub mod bank;
pub mod cdc;
pub mod stream;

pub mod lake;

pub mod dlq;

pub mod warehouse;

pub mod dbt;

pub mod kpi;

pub mod notify;

pub mod dag;

pub mod refresh;

pub mod embedded;

pub mod config;

pub mod cli;
pub mod commands;
pub mod exit;
pub mod headless;
pub mod interrupt;
pub mod pipeline;
pub mod telemetry;
pub mod tui;
