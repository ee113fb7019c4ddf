//! Variable-length integers, and a reader that never goes beyond its bytes.

/// What is wrong with some bytes.
pub(super) type Outcome<T> = Result<T, String>;

/// Appends an unsigned number: as many zero bits at the bottom of the first byte as bytes follow.
pub(super) fn put(out: &mut Vec<u8>, number: u64) {
    let bits = 64 - number.leading_zeros();
    let bytes = bits.div_ceil(7).max(1) as usize;
    if bytes > 8 {
        out.push(0);
        out.extend(number.to_le_bytes());
    } else {
        let marked = (number << bytes) | (1 << (bytes - 1));
        out.extend(&marked.to_le_bytes()[..bytes]);
    }
}

/// Appends a signed number, its sign moved to the lowest bit.
pub(super) fn put_signed(out: &mut Vec<u8>, number: i64) {
    put(out, ((number << 1) ^ (number >> 63)) as u64);
}

/// Appends a count and that many numbers.
pub(super) fn put_all(out: &mut Vec<u8>, numbers: &[u64]) {
    put(out, numbers.len() as u64);
    numbers.iter().for_each(|number| put(out, *number));
}

/// Reads numbers from a slice.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn take(&mut self, count: u64) -> Outcome<&'a [u8]> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let (taken, rest) = self
            .bytes
            .split_at_checked(count)
            .ok_or_else(|| format!("{count} bytes expected, {} left", self.bytes.len()))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Outcome<u8> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn number(&mut self) -> Outcome<u64> {
        let first = self.byte()?;
        let following = first.trailing_zeros().min(8) as usize;
        let mut bytes = [0; 8];
        if following == 8 {
            bytes.copy_from_slice(self.take(8)?);
            return Ok(u64::from_le_bytes(bytes));
        }
        bytes[0] = first;
        bytes[1..=following].copy_from_slice(self.take(following as u64)?);
        Ok(u64::from_le_bytes(bytes) >> (following + 1))
    }

    pub(super) fn signed(&mut self) -> Outcome<i64> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// A number that indexes or counts things in memory.
    pub(super) fn index(&mut self) -> Outcome<usize> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| format!("{number} is too large for an index"))
    }

    /// A count of things that take at least a byte each, so that a lie cannot reserve memory.
    pub(super) fn count(&mut self) -> Outcome<usize> {
        let count = self.index()?;
        if count > self.bytes.len() {
            return Err(format!("{count} entries announced in {} bytes", self.bytes.len()));
        }
        Ok(count)
    }

    /// A count and that many numbers.
    pub(super) fn indices(&mut self) -> Outcome<Vec<usize>> {
        (0..self.count()?).map(|_| self.index()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_have_mlirs_form() {
        let mut out = Vec::new();
        [0, 1, 127, 128, 16_383].into_iter().for_each(|n| put(&mut out, n));
        put_signed(&mut out, -1);
        assert_eq!(out, [1, 3, 255, 0x02, 0x02, 0xFE, 0xFF, 3]);
    }

    proptest! {
        #[test]
        fn prop_numbers_come_back(unsigned in any::<u64>(), shift in 0u32..64, signed in any::<i64>()) {
            let mut out = Vec::new();
            put(&mut out, unsigned >> shift);
            put_signed(&mut out, signed >> shift);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.number(), Ok(unsigned >> shift));
            prop_assert_eq!(reader.signed(), Ok(signed >> shift));
            prop_assert!(reader.is_empty());
        }
    }
}
