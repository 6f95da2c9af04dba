//! How a past is cut.

use super::{graded_splits, merge_turns};

#[test]
fn short_pasts_have_splits_of_one_length() {
    assert_eq!(graded_splits(256, 64, 528), None);
    assert_eq!(graded_splits(1024, 8, 528), None);
}

#[test]
fn long_pasts_end_in_short_splits() {
    for (pages, others, turns) in [(1024, 64, 1), (4096, 64, 2), (65536, 8, 2), (100_003, 7, 2), (300_000, 1, 2)] {
        let resident = 528;
        let (long, count, short) = graded_splits(pages, others, resident).expect("long enough");
        assert!(short >= 1 && 3 * short < long, "{long} and {short} pages");
        assert!(long * count < pages, "all of {pages} pages are in long splits");
        // Long ones are some turns of the device, and at most a third of the pages is left for short ones.
        assert!(count * others <= turns * resident && (count + 1) * others > turns * resident);
        assert!(
            3 * (pages - long * count) <= pages + 3 * long,
            "{} of {pages} pages are in short splits",
            pages - long * count
        );
    }
}

#[test]
fn a_merge_shares_its_slices_among_the_queries() {
    // Queries of a kv head, states, width of values; what a slice waits for.
    for (queries, states, width, turns) in
        [(1, 64, 128, 1), (1, 65, 128, 2), (4, 37, 128, 3), (8, 37, 128, 5), (5, 32, 64, 2), (8, 9, 256, 3)]
    {
        assert_eq!(merge_turns(queries, states, width), turns, "{queries} queries, {states} states of {width}");
    }
}
