//! The warehouse on a real PostgreSQL: loads under crashes and rivals, KPIs against brute force, reconciliation that finds
//! what was tampered with.

mod bank;
mod contract;
mod ground;
mod kpis;
mod loading;
mod reconciling;
#[cfg(any(feature = "stack", feature = "account"))]
mod snowflake;
