//! Ordinary and bad days.
