//! The targets without a fuzzer: their corpora, and seeds changed at random.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = fuzz().join("corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let files = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort_unstable();
    files
}

/// What cargo-fuzz finds is there, and nothing else.
#[test]
fn every_target_has_a_corpus_and_a_program() {
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(fuzz().join(folder)).unwrap();
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        entries.map(|entry| stem(entry.unwrap().path())).collect()
    };
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("corpus"), targets);
    assert_eq!(names("fuzz_targets"), targets);
}

#[test]
fn the_corpora_pass() {
    for &(name, target) in TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "{name}");
        for (path, bytes) in corpus {
            let passed = std::panic::catch_unwind(|| target(&bytes));
            assert!(passed.is_ok(), "{}", path.display());
        }
    }
}

/// One change of a seed.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Cut(Index),
    Remove(Index),
    /// The bytes from the one to the other once more, at the third.
    Repeat(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<(Index, u8)>().prop_map(|(at, byte)| Change::Set(at, byte)),
        any::<Index>().prop_map(Change::Cut),
        any::<Index>().prop_map(Change::Remove),
        any::<(Index, Index, Index)>().prop_map(|(from, to, at)| Change::Repeat(from, to, at)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let len = bytes.len() + 1;
    match change {
        Change::Set(at, byte) => {
            if let Some(old) = bytes.get_mut(at.index(len)) {
                *old = *byte;
            }
        }
        Change::Cut(at) => bytes.truncate(at.index(len)),
        Change::Remove(at) => {
            if at.index(len) < bytes.len() {
                bytes.remove(at.index(len));
            }
        }
        Change::Repeat(from, to, at) => {
            let (from, to) = (from.index(len), to.index(len));
            let part = bytes[from.min(to)..from.max(to)].to_vec();
            let at = at.index(len);
            bytes.splice(at..at, part);
        }
    }
}

proptest! {
    #[test]
    fn seeds_changed_at_random_pass(
        target in 0..TARGETS.len(),
        seed in any::<Index>(),
        changes in proptest::collection::vec(change(), 1..8),
    ) {
        let (name, target) = TARGETS[target];
        let mut corpus = corpus(name);
        let (_, mut bytes) = corpus.swap_remove(seed.index(corpus.len()));
        changes.iter().for_each(|change| apply(&mut bytes, change));
        target(&bytes);
    }
}
