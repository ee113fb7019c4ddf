//! Best-fit-decreasing packing: many short examples in one row of a batch.

use std::collections::BTreeMap;

/// Puts items of the given costs into bins of `capacity`, none cut, and gives the items of each bin.
///
/// Items come by decreasing cost, equal ones by index; each goes into the bin that it fills best, of equal bins into the
/// oldest. So the result depends on costs and capacity alone. No cost may be above the capacity.
pub(crate) fn best_fit_decreasing(costs: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|item| (std::cmp::Reverse(costs[*item]), *item));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Bins by the room that is left, oldest last so that it pops first.
    let mut by_room: BTreeMap<usize, std::collections::BTreeSet<usize>> = BTreeMap::new();
    for item in order {
        let cost = costs[item];
        debug_assert!(cost <= capacity);
        let best = by_room
            .range(cost..)
            .next()
            .and_then(|(room, bins)| Some((*room, *bins.first()?)));
        let (room, bin) = match best {
            Some((room, bin)) => {
                if let Some(equal) = by_room.get_mut(&room) {
                    equal.remove(&bin);
                    if equal.is_empty() {
                        by_room.remove(&room);
                    }
                }
                (room, bin)
            }
            None => {
                bins.push(Vec::new());
                (capacity, bins.len() - 1)
            }
        };
        bins[bin].push(item);
        by_room.entry(room.saturating_sub(cost)).or_default().insert(bin);
    }
    bins
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn items_go_where_they_fit_best() {
        assert_eq!(
            best_fit_decreasing(&[4, 8, 1, 4, 2, 1], 10),
            [vec![1, 4], vec![0, 3, 2, 5]]
        );
        assert_eq!(best_fit_decreasing(&[5, 5, 5], 5), [vec![0], vec![1], vec![2]]);
        assert_eq!(best_fit_decreasing(&[], 5), Vec::<Vec<usize>>::new());
    }

    proptest! {
        #[test]
        fn prop_every_item_once_and_no_bin_over(costs in prop::collection::vec(1usize..100, 0..200)) {
            let bins = best_fit_decreasing(&costs, 100);
            let mut seen: Vec<usize> = bins.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..costs.len()).collect::<Vec<_>>());
            for bin in &bins {
                prop_assert!(bin.iter().map(|item| costs[*item]).sum::<usize>() <= 100);
            }
            // No two bins could be one, which any-fit packing guarantees.
            let fill = |bin: &Vec<usize>| bin.iter().map(|item| costs[*item]).sum::<usize>();
            for (index, bin) in bins.iter().enumerate() {
                for other in &bins[index + 1..] {
                    prop_assert!(fill(bin) + fill(other) > 100);
                }
            }
        }
    }
}
