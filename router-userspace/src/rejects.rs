//! What was refused lately, of whatever source: `/rejects` and `viaduct rejects`.
//!
//! Sources note what they refuse with the name it had there and one line of why. The same thing
//! refused again takes its place at the end of the list and counts, so that a sender that repeats
//! itself does not push the others out. Bounded by [`MAX_REJECTS`].

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::route::Origin;

/// Refusals that are remembered.
pub const MAX_REJECTS: usize = 512;
/// Bytes that are kept of a name and of a reason.
const MAX_TEXT_BYTES: usize = 512;

#[derive(Default)]
pub struct Rejects {
    /// The latest last.
    list: Mutex<VecDeque<Reject>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    pub origin: Origin,
    /// What was refused: a subject and the application, a key, a file.
    pub what: String,
    pub why: String,
    /// How often, since it is in the list.
    pub count: u64,
    /// The latest time.
    pub at: SystemTime,
}

impl Rejects {
    pub fn note(&self, origin: Origin, what: &str, why: &str) {
        let (what, why) = (cut(what), cut(why));
        let mut list = self.lock();
        let known = list
            .iter()
            .rposition(|r| (r.origin, &*r.what, &*r.why) == (origin, what, why));
        let count = match known.and_then(|at| list.remove(at)) {
            Some(known) => known.count + 1,
            None => 1,
        };
        if list.len() >= MAX_REJECTS {
            list.pop_front();
        }
        list.push_back(Reject {
            origin,
            what: what.to_owned(),
            why: why.to_owned(),
            count,
            at: SystemTime::now(),
        });
    }

    /// Forgets what a source refused of something that it takes in now, or that is gone.
    pub fn clear(&self, origin: Origin, what: &str) {
        let what = cut(what);
        self.lock()
            .retain(|reject| (reject.origin, &*reject.what) != (origin, what));
    }

    /// The latest first.
    pub fn list(&self) -> Vec<Reject> {
        self.lock().iter().rev().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Reject>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At most [`MAX_TEXT_BYTES`] of a text, in whole characters.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_again_counts_and_the_oldest_makes_room() {
        let rejects = Rejects::default();
        rejects.note(Origin::Redis, "first", "port: 0");
        for n in 0..MAX_REJECTS - 1 {
            rejects.note(Origin::Redis, &n.to_string(), "no");
        }
        rejects.note(Origin::Redis, "first", "port: 0");
        rejects.note(Origin::Etcd, "first", "port: 0");
        let list = rejects.list();
        assert_eq!(list.len(), MAX_REJECTS);
        assert_eq!((list[0].origin, list[0].count), (Origin::Etcd, 1));
        assert_eq!((&*list[1].what, list[1].count), ("first", 2));
        assert_eq!(list[MAX_REJECTS - 1].what, "1", "the oldest went");
        rejects.clear(Origin::Redis, "first");
        assert!(
            rejects
                .list()
                .iter()
                .all(|reject| reject.origin != Origin::Redis || reject.what != "first")
        );
    }

    #[test]
    fn long_texts_are_cut_in_whole_characters() {
        let rejects = Rejects::default();
        rejects.note(
            Origin::Nats,
            &"ä".repeat(MAX_TEXT_BYTES),
            &format!("x{}", "ä".repeat(MAX_TEXT_BYTES)),
        );
        let reject = &rejects.list()[0];
        assert_eq!(
            (reject.what.len(), reject.why.len()),
            (MAX_TEXT_BYTES, MAX_TEXT_BYTES - 1)
        );
    }
}
