//! One-dimensional weighted k-means, deterministic: the tables of palettized weights.

use half::f16;

const MAX_ITERATIONS: usize = 40;

/// Chooses `2^bits` table entries for `values` and the entry of each value.
///
/// Minimises `Σ importance · (value − entry)²` by Lloyd's iterations over the sorted values, from two starts (equal
/// masses, equal distances), of which the better end is kept; where so few different values occur that each can have its
/// own entry, that is the table, filled up with its last one. The table is in ascending order; entries are rounded to
/// fp16 *before* the values are assigned. Equal input gives equal output.
///
/// # Shapes
/// - `values`, `importance` (all ones when absent): `[n]`, `n ≥ 1`, finite; importance not negative
/// - result: table `[2^bits]`, indices `[n]`
///
/// ```
/// use planish_export::weights::palettize;
/// let (table, indices) = palettize(&[0.5, -1.0, 0.5, 2.0], None, 2);
/// let back: Vec<f32> = indices.iter().map(|&i| table[usize::from(i)].to_f32()).collect();
/// assert_eq!(back, [0.5, -1.0, 0.5, 2.0]); // three different values, four entries
/// ```
pub fn palettize(values: &[f32], importance: Option<&[f32]>, bits: usize) -> (Vec<f16>, Vec<u8>) {
    let sorted = Sorted::new(values, importance);
    let k = 1 << bits;
    if let Some(table) = sorted.exact_table(k) {
        return (table.clone(), sorted.assign(&table));
    }
    let starts = [sorted.equal_masses(k), sorted.equal_distances(k)];
    let ends = starts.map(|start| sorted.lloyd(start));
    let best = if ends[1].1 < ends[0].1 { &ends[1].0 } else { &ends[0].0 };
    let table: Vec<f16> = best.iter().map(|&c| f16::from_f64(c)).collect();
    (table.clone(), sorted.assign(&table))
}

/// Values in ascending order with prefix sums, so that a cluster's mean and cost take two look-ups.
struct Sorted {
    values: Vec<f64>,
    order: Vec<u32>,
    /// Σ w, Σ w·x, Σ w·x² of the first i values.
    mass: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Sorted {
    fn new(values: &[f32], importance: Option<&[f32]>) -> Self {
        // An f32's bits, flipped so that integers order as the numbers do, above its index: one integer sort.
        let key = |(i, v): (usize, &f32)| {
            let bits = v.to_bits();
            let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            u64::from(ordered) << 32 | i as u64
        };
        let mut keys: Vec<u64> = values.iter().enumerate().map(key).collect();
        keys.sort_unstable();
        let order: Vec<u32> = keys.iter().map(|k| *k as u32).collect();
        // A floor keeps values that the calibration never used from drifting anywhere.
        let mean = importance.map_or(1.0, |w| w.iter().map(|w| f64::from(*w)).sum::<f64>() / w.len() as f64);
        let floor = if mean > 0.0 { mean * 1e-3 } else { 1.0 };
        let mut sorted = Self {
            values: order.iter().map(|&i| f64::from(values[i as usize])).collect(),
            order,
            mass: vec![0.0],
            first: vec![0.0],
            second: vec![0.0],
        };
        let (mut mass, mut first, mut second) = (0.0, 0.0, 0.0);
        for (x, &i) in sorted.values.iter().zip(&sorted.order) {
            let w = importance.map_or(1.0, |w| f64::from(w[i as usize]).max(floor));
            mass += w;
            first += w * x;
            second += w * x * x;
            sorted.mass.push(mass);
            sorted.first.push(first);
            sorted.second.push(second);
        }
        sorted
    }

    /// One entry for each different value, if `k` suffice: Lloyd's iterations need not find that.
    fn exact_table(&self, k: usize) -> Option<Vec<f16>> {
        let mut table: Vec<f64> = Vec::with_capacity(k);
        for value in &self.values {
            if table.last() != Some(value) {
                if table.len() == k {
                    return None;
                }
                table.push(*value);
            }
        }
        table.resize(k, *table.last()?);
        Some(table.into_iter().map(f16::from_f64).collect())
    }

    fn equal_masses(&self, k: usize) -> Vec<f64> {
        let total = self.mass[self.values.len()];
        let at = |i: usize| self.mass.partition_point(|m| *m < total * (i as f64 + 0.5) / k as f64);
        (0..k)
            .map(|i| self.values[at(i).clamp(1, self.values.len()) - 1])
            .collect()
    }

    fn equal_distances(&self, k: usize) -> Vec<f64> {
        let (low, high) = (self.values[0], self.values[self.values.len() - 1]);
        (0..k)
            .map(|i| low + (high - low) * (i as f64 + 0.5) / k as f64)
            .collect()
    }

    /// Centres after the iterations, ascending, and their cost.
    fn lloyd(&self, mut centres: Vec<f64>) -> (Vec<f64>, f64) {
        let mut previous = Vec::new();
        for _ in 0..MAX_ITERATIONS {
            let edges = self.edges(&centres);
            if edges == previous {
                break;
            }
            for (i, centre) in centres.iter_mut().enumerate() {
                let mass = self.mass[edges[i + 1]] - self.mass[edges[i]];
                if mass > 0.0 {
                    *centre = (self.first[edges[i + 1]] - self.first[edges[i]]) / mass;
                }
            }
            previous = edges;
        }
        let cost = self.cost(&centres);
        (centres, cost)
    }

    /// Where each cluster begins: a value belongs to the nearest centre.
    fn edges(&self, centres: &[f64]) -> Vec<usize> {
        let between = centres.windows(2).map(|pair| {
            let middle = (pair[0] + pair[1]) / 2.0;
            self.values.partition_point(|v| *v <= middle)
        });
        std::iter::once(0).chain(between).chain([self.values.len()]).collect()
    }

    fn cost(&self, centres: &[f64]) -> f64 {
        let edges = self.edges(centres);
        let cluster = |(i, c): (usize, &f64)| {
            let part = |sums: &[f64]| sums[edges[i + 1]] - sums[edges[i]];
            part(&self.second) - 2.0 * c * part(&self.first) + c * c * part(&self.mass)
        };
        centres.iter().enumerate().map(cluster).sum()
    }

    fn assign(&self, table: &[f16]) -> Vec<u8> {
        let edges = self.edges(&table.iter().map(|c| c.to_f64()).collect::<Vec<_>>());
        let mut indices = vec![0; self.values.len()];
        for entry in 0..table.len() {
            for &i in &self.order[edges[entry]..edges[entry + 1]] {
                indices[i as usize] = entry as u8;
            }
        }
        indices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cost(values: &[f32], weights: &[f32], table: &[f16], indices: &[u8]) -> f64 {
        let term =
            |((v, w), i): ((&f32, &f32), &u8)| f64::from(*w) * f64::from(v - table[*i as usize].to_f32()).powi(2);
        values.iter().zip(weights).zip(indices).map(term).sum()
    }

    #[test]
    fn important_values_are_met_better() {
        let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let heavy: Vec<f32> = (0..100).map(|i| if i < 20 { 1000.0 } else { 1.0 }).collect();
        let (plain, weighted) = (palettize(&values, None, 2), palettize(&values, Some(&heavy), 2));
        let on_heavy = |(table, indices): &(Vec<f16>, Vec<u8>)| cost(&values, &heavy, table, indices);
        assert!(on_heavy(&weighted) < 0.5 * on_heavy(&plain));
    }

    /// Brute force over all contiguous partitions is the global optimum in one dimension.
    #[test]
    fn small_case_is_near_the_optimum() {
        let values = [-3.0f32, -2.9, -0.1, 0.0, 0.1, 0.2, 5.0, 5.1];
        let (table, indices) = palettize(&values, None, 2);
        let found = cost(&values, &[1.0; 8], &table, &indices);
        let best = (1..6)
            .flat_map(|a| (a + 1..7).flat_map(move |b| (b + 1..8).map(move |c| [0, a, b, c, 8])))
            .map(|edges| {
                edges
                    .windows(2)
                    .map(|e| {
                        let part = &values[e[0]..e[1]];
                        let mean = part.iter().sum::<f32>() / part.len() as f32;
                        part.iter().map(|v| f64::from((v - mean).powi(2))).sum::<f64>()
                    })
                    .sum::<f64>()
            })
            .fold(f64::MAX, f64::min);
        assert!(found <= best + 1e-3, "{found} {best}");
    }

    proptest! {
        #[test]
        fn prop_few_different_values_are_exact(bits in 1usize..=6, seed in 0usize..1000) {
            let k = 1 << bits;
            let values: Vec<f32> = (0..200).map(|i| (((i + seed) * i * 7919) % k) as f32 * 0.25 - 3.0).collect();
            let (table, indices) = palettize(&values, None, bits);
            prop_assert!(values.iter().zip(&indices).all(|(v, i)| table[usize::from(*i)].to_f32() == *v));
        }

        #[test]
        fn prop_every_value_gets_its_nearest_entry(values in proptest::collection::vec(-100f32..100.0, 1..200), bits in 1usize..=6) {
            let (table, indices) = palettize(&values, None, bits);
            prop_assert!(table.windows(2).all(|p| p[0] <= p[1]));
            for (v, i) in values.iter().zip(&indices) {
                let distance = |c: &f16| (c.to_f32() - v).abs();
                let nearest = table.iter().map(distance).fold(f32::MAX, f32::min);
                prop_assert!(distance(&table[*i as usize]) <= nearest + 1e-4);
            }
        }
    }
}
