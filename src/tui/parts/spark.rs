//! A row of small bars: two values to a cell, four heights.

/// Braille dots by height, from the bottom up.
const LEFT: [u32; 5] = [0, 0x40, 0x44, 0x46, 0x47];
const RIGHT: [u32; 5] = [0, 0x80, 0xA0, 0xB0, 0xB8];
const BLANK: u32 = 0x2800;

/// The newest values that fit, newest at the right. Zero is the ground line; whatever is more stands above it.
pub(crate) fn bars(values: impl DoubleEndedIterator<Item = u64>, width: usize) -> String {
    let mut newest: Vec<u64> = values.rev().take(width * 2).collect();
    newest.reverse();
    let most = newest.iter().copied().max().unwrap_or_default();
    let mut heights = vec![0; (width * 2).saturating_sub(newest.len())];
    heights.extend(newest.into_iter().map(|value| height_of(value, most)));
    heights.chunks(2).filter_map(|pair| char::from_u32(BLANK | LEFT[pair[0]] | RIGHT[pair.get(1).copied().unwrap_or_default()])).collect()
}

fn height_of(value: u64, most: u64) -> usize {
    if value == 0 {
        return 1;
    }
    let thirds = (u128::from(value) * 3).div_ceil(u128::from(most.max(1)));
    1 + usize::try_from(thirds).unwrap_or(3).clamp(1, 3)
}

/// How high the bars of a braille cell stand, 0 to 4; None for any other character.
pub(crate) fn height(cell: char) -> Option<usize> {
    let dots = u32::from(cell).checked_sub(BLANK).filter(|it| *it < 256)?;
    let rows = [0xC0, 0x24, 0x12, 0x09];
    Some(rows.iter().rposition(|row| dots & row != 0).map_or(0, |row| row + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_newest_value_stands_at_the_right() {
        assert_eq!(bars([0, 0, 4, 8].into_iter(), 2), "⣀⣾");
        assert_eq!(bars([9].into_iter(), 2), "⠀⢸");
        assert_eq!(bars(std::iter::empty(), 2), "⠀⠀");
    }

    proptest! {
        #[test]
        fn a_row_is_as_wide_as_asked(values in proptest::collection::vec(any::<u64>(), 0..200), width in 0_usize..80) {
            let row = bars(values.into_iter(), width);
            prop_assert_eq!(row.chars().count(), width);
            prop_assert!(row.chars().all(|cell| height(cell).is_some()));
        }
    }
}
