//! Screens as reviewed pictures, keys as strings.

mod bank_day;
mod pictures;
mod pressing;
