//! The order of the rows of q and k projections.
//!
//! Rope turns pairs of rows within a head of `h` rows. GGUF's `llama` files keep a pair side by side,
//! `(0, 1) (2, 3) …`; Hugging Face keeps it half a head apart, `(0, h/2) (1, h/2 + 1) …`. Mixing the two up gives text
//! that looks half right.

/// How the rows of a tensor are to be taken from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As they are.
    Same,
    /// From pairs side by side to pairs half a head apart (GGUF `llama` → Hugging Face).
    SplitPairs {
        /// Heads of this projection.
        n_heads: usize,
    },
    /// From pairs half a head apart to pairs side by side (Hugging Face → GGUF `llama`).
    JoinPairs {
        /// Heads of this projection.
        n_heads: usize,
    },
}

impl RowOrder {
    /// The row of the source that becomes row `row` of `n_rows`, a multiple of `2 · n_heads`.
    ///
    /// ```
    /// use planish_hub::gguf::rows::RowOrder;
    /// let order = RowOrder::SplitPairs { n_heads: 1 };
    /// assert_eq!((0..6).map(|row| order.source(row, 6)).collect::<Vec<_>>(), [0, 2, 4, 1, 3, 5]);
    /// ```
    pub fn source(self, row: usize, n_rows: usize) -> usize {
        match self {
            Self::Same => row,
            Self::SplitPairs { n_heads } => {
                let (head, in_head, half) = place(row, n_rows, n_heads);
                head + 2 * (in_head % half) + in_head / half
            }
            Self::JoinPairs { n_heads } => {
                let (head, in_head, half) = place(row, n_rows, n_heads);
                head + in_head / 2 + half * (in_head % 2)
            }
        }
    }
}

/// First row of the head, row within the head, half the head's size.
fn place(row: usize, n_rows: usize, n_heads: usize) -> (usize, usize, usize) {
    let head_dim = n_rows / n_heads;
    (row / head_dim * head_dim, row % head_dim, head_dim / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_orders_undo_each_other() {
        let (n_rows, n_heads) = (48, 3);
        for row in 0..n_rows {
            let split = RowOrder::SplitPairs { n_heads }.source(row, n_rows);
            assert_eq!(RowOrder::JoinPairs { n_heads }.source(split, n_rows), row);
        }
    }

    #[test]
    fn pairs_stay_within_their_head() {
        let order = RowOrder::SplitPairs { n_heads: 2 };
        let rows: Vec<_> = (0..8).map(|row| order.source(row, 8)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
