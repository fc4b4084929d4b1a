//! Screens as reviewed pictures, keys as strings, the terminal on a pty.

mod bank_day;
mod days;
mod pages;
mod pictures;
mod pressing;
mod terminal;
