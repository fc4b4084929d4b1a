//! Credible people and amounts out of seeded randomness. Pure: the same generator state gives the same words.

use chrono::{Days, NaiveDate};
use fake::{
    Fake,
    faker::{
        address::en::{BuildingNumber, CityName, StateAbbr, StreetName, ZipCode},
        name::en::{FirstName, LastName},
    },
};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::event::{AccountType, Person};
use crate::units::Money;

/// One currency: amounts and balances are added up everywhere, and dollars and yen do not add.
pub(super) const CURRENCY: &str = "USD";

/// A new customer, an adult on `today`. The e-mail is unique by the id and reaches nobody: `example.com` is reserved.
pub(super) fn person(rng: &mut ChaCha8Rng, id: i64, today: NaiveDate) -> Person {
    let first_name: String = FirstName().fake_with_rng(rng);
    let last_name: String = LastName().fake_with_rng(rng);
    let mailbox: String = format!("{first_name}.{last_name}").chars().filter(|it| it.is_ascii_alphanumeric() || *it == '.').collect();
    let email = format!("{}.{id}@example.com", mailbox.to_ascii_lowercase());
    let age_days: u64 = rng.random_range(18 * 366..85 * 365);
    let date_of_birth = today.checked_sub_days(Days::new(age_days)).unwrap_or(today);
    Person { id, first_name, last_name, email, phone: phone(rng), date_of_birth, address: address(rng) }
}

/// Numbers 555-0100 to 555-0199 belong to nobody in every area code.
pub(super) fn phone(rng: &mut ChaCha8Rng) -> String {
    format!("+1-{}{:02}-555-01{:02}", rng.random_range(2..10_u32), rng.random_range(0..100_u32), rng.random_range(0..100_u32))
}

pub(super) fn address(rng: &mut ChaCha8Rng) -> String {
    let number: String = BuildingNumber().fake_with_rng(rng);
    let street: String = StreetName().fake_with_rng(rng);
    let city: String = CityName().fake_with_rng(rng);
    let state: String = StateAbbr().fake_with_rng(rng);
    let zip: String = ZipCode().fake_with_rng(rng);
    format!("{number} {street}, {city}, {state} {zip}")
}

/// Unique by the id, with two check digits (ISO 7064 mod 97-10, as in an IBAN): `LL57000000000042`.
pub(super) fn account_number(id: i64) -> String {
    // L is 21 in an IBAN's arithmetic; the check digits stand as 00 while they are computed.
    let check = 98 - (i128::from(id) * 1_000_000 + 21_21_00) % 97;
    format!("LL{check:02}{id:012}")
}

/// Per cent a year, in hundredths.
pub(super) fn interest_rate(rng: &mut ChaCha8Rng, account_type: AccountType) -> Money {
    Money::from_cents(match account_type {
        AccountType::Savings => rng.random_range(50..=450),
        AccountType::Checking => rng.random_range(0..=50),
        AccountType::Credit => rng.random_range(1290..=2490),
        AccountType::Loan => rng.random_range(390..=1190),
    })
}

/// The quantiles of a log-normal distribution with median 1 and sigma 1.1, in thousandths, at 0, 1/16, …, 16/16.
const QUANTILES: [i64; 17] = [60, 185, 282, 377, 476, 584, 704, 842, 1_000, 1_188, 1_421, 1_714, 2_099, 2_655, 3_553, 5_404, 14_000];

/// An amount that is usually around the median, sometimes many times as much. Integers only: a logarithm may differ in its last
/// bit between machines, and the same seed must be the same bank everywhere.
pub(super) fn amount(rng: &mut ChaCha8Rng, median: Money) -> Money {
    let place: i64 = rng.random_range(0..16 * 1024);
    let segment = usize::try_from(place / 1024).expect("0 to 15");
    let (low, high) = (QUANTILES[segment], QUANTILES[segment + 1]);
    let thousandths = low * 1024 + (high - low) * (place % 1024);
    Money::from_cents((median.cents() * thousandths / (1000 * 1024)).max(1))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn an_account_number_passes_the_iban_check() {
        for id in [1, 42, 999_999_999_999] {
            let number = account_number(id);
            let digits = format!("{}2121{}", &number[4..], &number[2..4]);
            assert_eq!(digits.parse::<u128>().expect("digits") % 97, 1, "{number}");
            assert_eq!(number.len(), 16);
        }
    }

    #[test]
    fn half_of_the_amounts_lie_below_the_median_and_none_is_nothing() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let amounts: Vec<Money> = (0..10_000).map(|_| amount(&mut rng, Money::from_cents(6_000))).collect();
        let below = amounts.iter().filter(|it| **it < Money::from_cents(6_000)).count();
        assert!((4_800..5_200).contains(&below), "{below}");
        assert!(amounts.iter().all(|it| *it > Money::ZERO));
    }

    #[test]
    fn the_same_seed_gives_the_same_person_and_nobody_real_gets_mail() {
        let today = NaiveDate::from_ymd_opt(2026, 11, 22).expect("a day");
        let one = person(&mut ChaCha8Rng::seed_from_u64(42), 7, today);
        assert_eq!(one, person(&mut ChaCha8Rng::seed_from_u64(42), 7, today));
        assert!(one.email.ends_with(".7@example.com") && one.email.is_ascii());
    }
}
