use super::dtype::Dtype;
use super::host::TensorView;

/// A NaN or infinity in a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// The tensor.
    pub name: String,
    /// Position of the first such element in row-major order.
    pub index: usize,
    /// The element, widened.
    pub value: f64,
}

/// Elements looked at together; the inner loop has no exit, so that the compiler can use vector instructions.
const BLOCK: usize = 4096;

pub(crate) fn find(view: &TensorView<'_>) -> Option<NonFinite> {
    let at = match view.dtype {
        Dtype::F32 => first::<4>(view.bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first::<2>(view.bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => first::<2>(view.bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F64 => first::<8>(view.bytes, |b| u64::from_le_bytes(b) >> 52 & 0x7ff == 0x7ff),
        _ => None,
    }?;
    Some(NonFinite {
        name: view.name.to_string(),
        index: at,
        value: element(view, at),
    })
}

/// The index of the first element whose exponent bits are all ones.
fn first<const N: usize>(bytes: &[u8], is_non_finite: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (elements, _) = bytes.as_chunks::<N>();
    for (block_idx, block) in elements.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, e| any | is_non_finite(*e)) {
            return block
                .iter()
                .position(|e| is_non_finite(*e))
                .map(|i| block_idx * BLOCK + i);
        }
    }
    None
}

fn element(view: &TensorView<'_>, index: usize) -> f64 {
    let size = view.dtype.size();
    let one = &view.bytes[index * size..(index + 1) * size];
    match (view.dtype, one.first_chunk::<8>()) {
        (Dtype::F64, Some(bytes)) => f64::from_le_bytes(*bytes),
        _ => {
            let one = TensorView {
                bytes: one,
                shape: &[],
                ..*view
            };
            one.to_f32()
                .ok()
                .and_then(|values| values.first().copied())
                .map_or(f64::NAN, f64::from)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostTensor;

    fn check(dtype: Dtype, bad: f32) {
        for at in [0, 1, 4095, 4096, 9999] {
            let mut values = vec![f32::from(half::f16::MAX); 10_000];
            values[at] = bad;
            let tensor = HostTensor::from_f32_as(dtype, &[100, 100], &values).unwrap();
            let found = tensor.view("w").find_non_finite().unwrap();
            assert_eq!((found.index, found.name.as_str()), (at, "w"));
            assert_eq!(found.value.is_nan(), bad.is_nan());
        }
    }

    #[test]
    fn first_bad_element_is_found_in_every_float_type() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                check(dtype, bad);
            }
        }
    }

    #[test]
    fn largest_finite_values_pass() {
        for (dtype, value) in [(Dtype::F32, f32::MAX), (Dtype::F16, 65504.0), (Dtype::BF16, 3.389e38)] {
            let tensor = HostTensor::from_f32_as(dtype, &[2], &[value, -value]).unwrap();
            assert_eq!(tensor.view("w").find_non_finite(), None, "{dtype}");
        }
    }

    #[test]
    fn doubles_are_looked_at_and_integers_are_not() {
        let bytes = [1.0f64, f64::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensor = HostTensor::new(Dtype::F64, &[2], bytes).unwrap();
        assert_eq!(tensor.view("w").find_non_finite().unwrap().value, f64::INFINITY);
        let tensor = HostTensor::new(Dtype::U32, &[1], vec![0xff; 4]).unwrap();
        assert_eq!(tensor.view("w").find_non_finite(), None);
    }
}
