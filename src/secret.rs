//! A text that is never printed: passwords, secret keys, and addresses that carry them.

use std::fmt;

/// Prints as `***`; the text itself comes out only by [`Secret::reveal`], which is easy to search for.
#[derive(Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

/// An address without its password, fit for logs and screens: `postgres://bank@127.0.0.1:5432/bank`.
pub fn without_password(address: &str) -> String {
    match url::Url::parse(address) {
        Ok(mut url) => {
            // A URL that cannot carry a password has none to hide.
            let _ = url.set_password(None);
            url.set_query(None);
            url.to_string()
        }
        Err(_) => "(not a URL)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_print() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?}"), "*** ***");
        assert_eq!(secret.reveal(), "hunter2");
    }

    #[test]
    fn an_address_is_shown_without_its_password() {
        assert_eq!(without_password("postgres://bank:hunter2@db:5432/bank?sslpassword=x"), "postgres://bank@db:5432/bank");
        assert_eq!(without_password("hunter2"), "(not a URL)");
    }
}
