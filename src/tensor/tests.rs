use super::*;

/// A `[2, 3, 4, 5]` tensor whose element at (b, h, t, c) is `1000 b + 100 h + 10 t + c`, exact in every dtype up to f16.
fn numbers() -> Vec<f32> {
    let mut data = Vec::new();
    for b in 0..2 {
        for h in 0..3 {
            for t in 0..4 {
                data.extend((0..5).map(|c| (1000 * b + 100 * h + 10 * t + c) as f32));
            }
        }
    }
    data
}

/// The transpose `[2, 4, 3, 5] -> [2, 3, 4, 5]` with reversed channels, of the same numbers.
fn transposed_reversed(data: &[f32]) -> TensorView<'_> {
    let last = &data[4..];
    // SAFETY: the strides reach elements 0..120 of the borrowed slice, seen from element 4.
    unsafe { TensorView::from_raw(last.as_ptr().cast(), [2, 4, 3, 5], [60, 5, 20, -1], Dtype::F32) }
}

fn row(view: &TensorView<'_>, b: usize, h: usize, t: usize) -> Vec<f32> {
    let mut out = vec![0.0; view.width()];
    view.read_row_f32(b, h, t, &mut out);
    out
}

#[test]
fn rows_of_every_dtype_are_read_exactly() {
    let data = numbers();
    let expected = [1230.0, 1231.0, 1232.0, 1233.0, 1234.0];
    assert_eq!(row(&TensorView::from_slice(&data, [2, 3, 4, 5]), 1, 2, 3), expected);
    let halves: Vec<f16> = data.iter().map(|x| f16::from_f32(*x)).collect();
    assert_eq!(row(&TensorView::from_slice(&halves, [2, 3, 4, 5]), 1, 2, 3), expected);
    let brains: Vec<bf16> = data.iter().map(|x| bf16::from_f32(x / 10.0)).collect();
    let rounded: Vec<f32> = brains[115..].iter().map(|x| x.to_f32()).collect();
    assert_eq!(row(&TensorView::from_slice(&brains, [2, 3, 4, 5]), 1, 2, 3), rounded);
}

#[test]
fn strided_rows_are_gathered() {
    let data = numbers();
    let view = transposed_reversed(&data);
    assert!(view.row(0, 0, 0).is_none());
    assert_eq!(row(&view, 1, 3, 2), [1234.0, 1233.0, 1232.0, 1231.0, 1230.0]);
    let mut bytes = vec![0; 20];
    view.copy_row_bytes(0, 1, 0, &mut bytes);
    let expected: Vec<u8> = [14f32, 13.0, 12.0, 11.0, 10.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(bytes, expected);
}

#[test]
fn slices_and_heads_keep_their_place() {
    let data = numbers();
    let view = TensorView::from_slice(&data, [2, 3, 4, 5]);
    assert_eq!(row(&view.slice_tokens(2, 2), 1, 0, 1)[0], 1030.0);
    assert_eq!(row(&view.head(1, 2).slice_tokens(1, 1), 0, 0, 0)[0], 1210.0);
    assert_eq!(view.slice_tokens(4, 0).tokens(), 0);
}

#[test]
#[should_panic(expected = "is outside")]
fn a_row_outside_the_view_panics() {
    let data = numbers();
    TensorView::from_slice(&data, [2, 3, 4, 5]).row_ptr(0, 3, 0);
}

#[test]
#[should_panic(expected = "are outside")]
fn tokens_outside_the_view_panic() {
    let data = numbers();
    let _ = TensorView::from_slice(&data, [2, 3, 4, 5]).slice_tokens(3, 2);
}

#[test]
fn writing_rounds_to_nearest_even() {
    let row = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0, f32::INFINITY];
    let mut brains = [bf16::ZERO; 4];
    TensorViewMut::from_slice(&mut brains, [1, 1, 1, 4]).write_row_f32(0, 0, 0, &row);
    assert_eq!(brains.map(bf16::to_f32), [1.0, 1.0 + 4.0 / 256.0, -0.0, f32::INFINITY]);
    let row = [1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65520.0, 2f32.powi(-25)];
    let mut halves = [f16::ZERO; 4];
    TensorViewMut::from_slice(&mut halves, [1, 1, 1, 4]).write_row_f32(0, 0, 0, &row);
    assert_eq!(halves.map(f16::to_f32), [1.0, 1.0 + 4.0 / 2048.0, f32::INFINITY, 0.0]);
}

#[test]
fn contiguous_and_strided_writes_agree() {
    let values: Vec<f32> = (0..97).map(|i| (i as f32 - 48.0) * 1.234_567).collect();
    let mut plain = vec![bf16::ZERO; 97];
    TensorViewMut::from_slice(&mut plain, [1, 1, 1, 97]).write_row_f32(0, 0, 0, &values);
    let mut spread = vec![bf16::ZERO; 3 * 97];
    // SAFETY: every third element of the exclusively borrowed vector.
    let view =
        unsafe { TensorViewMut::from_raw("out", spread.as_mut_ptr().cast(), [1, 1, 1, 97], [0, 0, 0, 3], Dtype::BF16) };
    view.unwrap().write_row_f32(0, 0, 0, &values);
    assert!(spread.iter().step_by(3).eq(&plain));
    assert!(spread.iter().enumerate().all(|(i, x)| i % 3 == 0 || *x == bf16::ZERO));
}

#[test]
fn bytes_round_trip() {
    let data = numbers();
    let from = transposed_reversed(&data);
    let mut copy = vec![0f32; 120];
    let mut to = TensorViewMut::from_slice(&mut copy, [2, 4, 3, 5]);
    let mut bytes = vec![0; 20];
    from.copy_row_bytes(1, 2, 1, &mut bytes);
    to.write_row_bytes(1, 2, 1, &bytes);
    assert_eq!(row(&to.as_view(), 1, 2, 1), row(&from, 1, 2, 1));
}

#[test]
fn parts_of_an_output_are_written_apart() {
    let mut data = vec![0f32; 2 * 3 * 4 * 2];
    let view = TensorViewMut::from_slice(&mut data, [2, 3, 4, 2]);
    std::thread::scope(|scope| {
        for (i, head) in view.split_heads().into_iter().enumerate() {
            let (mut before, mut after) = head.split_tokens_at(1);
            scope.spawn(move || before.write_row_f32(0, 0, 0, &[i as f32, 0.5]));
            scope.spawn(move || after.write_row_f32(0, 0, 2, &[i as f32, 3.5]));
        }
    });
    let view = TensorView::from_slice(&data, [2, 3, 4, 2]);
    for i in 0..6 {
        assert_eq!(row(&view, i / 3, i % 3, 0), [i as f32, 0.5]);
        assert_eq!(row(&view, i / 3, i % 3, 1), [0.0, 0.0]);
        assert_eq!(row(&view, i / 3, i % 3, 3), [i as f32, 3.5]);
    }
}

#[test]
fn overlapping_outputs_are_refused() {
    for (shape, strides, overlap) in [
        ([2, 3, 4, 5], [60, 20, 5, 1], false),
        ([2, 3, 4, 5], [0, 20, 5, 1], true),
        ([1, 3, 4, 5], [0, 20, 5, 1], false),
        ([2, 3, 4, 5], [1, 2, -6, 24], false),
        ([1, 1, 4, 5], [0, 0, 1, 1], true),
        ([1, 1, 4, 5], [0, 0, 4, 1], true),
        ([0, 1, 4, 5], [0, 0, 0, 0], false),
    ] {
        assert_eq!(may_overlap(&shape, &strides), overlap, "{shape:?} {strides:?}");
    }
    let mut one = [0f32; 1];
    // SAFETY: only element 0 is reachable, and the refused view is never made.
    let view = unsafe { TensorViewMut::from_raw("output", one.as_mut_ptr().cast(), [1, 1, 1, 4], [0; 4], Dtype::F32) };
    assert!(
        view.unwrap_err().to_string().starts_with("output: expected memory in which every element is written once")
    );
}

#[test]
fn empty_views_have_empty_rows() {
    let nothing: [f32; 0] = [];
    let view = TensorView::from_slice(&nothing, [1, 1, 3, 0]);
    assert!(matches!(view.row(0, 0, 2), Some(Row::F32([]))));
    view.read_row_f32(0, 0, 2, &mut []);
    view.copy_row_bytes(0, 0, 2, &mut []);
    let mut nothing: [f32; 0] = [];
    assert_eq!(TensorViewMut::from_slice(&mut nothing, [0, 2, 3, 4]).split_heads().len(), 0);
}

#[test]
fn masks_broadcast() {
    let visible = [1u8, 0, 2, 0, 0, 1];
    let mask = MaskView::from_visible(&visible, [2, 1, 1, 3]);
    mask.expect("mask", 2, 8, 4, 3).unwrap();
    let message = mask.expect("mask", 3, 8, 4, 3).unwrap_err().to_string();
    assert_eq!(message, "mask: expected shape [3 or 1, 8 or 1, 4 or 1, 3], found [2, 1, 1, 3]");
    let mut bias = [9.0; 2];
    mask.read_bias(1, 7, 3, 1, &mut bias);
    assert_eq!(bias, [f32::NEG_INFINITY, 0.0]);
    assert!(matches!(mask.row(0, 5, 2), Some(MaskRow::Visible([1, 0, 2]))));
    assert!(mask.is_open(0, 5, 2, 2..3) && mask.is_open(0, 5, 2, 0..1) && !mask.is_open(0, 5, 2, 0..3));
}

#[test]
fn additive_masks_are_read_in_any_dtype() {
    let lowest = bf16::from_f32(f32::MIN);
    let data = [bf16::ZERO, lowest, bf16::from_f32(-0.5), bf16::ONE];
    let mask = MaskView::from_additive(&data, [1, 2, 1, 2]);
    let mut bias = [9.0; 2];
    mask.read_bias(3, 1, 5, 0, &mut bias);
    assert_eq!(bias, [-0.5, 1.0]);
    mask.read_bias(0, 0, 0, 0, &mut bias);
    assert_eq!(bias, [0.0, lowest.to_f32()]);
    assert!(mask.is_open(0, 0, 0, 0..1) && !mask.is_open(0, 0, 0, 0..2));
    for zeros in [
        MaskView::from_additive(&[0.0f32, -0.0], [1, 1, 1, 2]),
        MaskView::from_additive(&[f16::ZERO, f16::NEG_ZERO], [1, 1, 1, 2]),
    ] {
        assert!(zeros.is_open(0, 0, 0, 0..2));
    }
    for ones in [
        MaskView::from_additive(&[0.0f32, 1.0], [1, 1, 1, 2]),
        MaskView::from_additive(&[f16::ZERO, f16::ONE], [1, 1, 1, 2]),
    ] {
        assert!(ones.is_open(0, 0, 0, 0..1) && !ones.is_open(0, 0, 0, 0..2));
    }
    // SAFETY: the same four elements, the token axis first.
    let strided = unsafe {
        MaskView::from_raw(data.as_ptr().cast(), [1, 1, 2, 2], [0, 0, 1, 2], MaskKind::Additive(Dtype::BF16))
    };
    assert!(strided.row(0, 0, 1).is_none() && !strided.is_open(0, 0, 0, 0..1));
    strided.read_bias(0, 0, 1, 0, &mut bias);
    assert_eq!(bias, [lowest.to_f32(), 1.0]);
}

#[test]
fn dtype_names_round_trip() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        assert_eq!(Dtype::from_name(dtype.name()), Ok(dtype));
    }
    let message = Dtype::from_name("int8").unwrap_err().to_string();
    assert_eq!(message, "dtype: expected \"float32\", \"float16\" or \"bfloat16\", found \"int8\"");
}
