//! The indices of a fixed array, given out lowest first.

use std::collections::BTreeSet;

pub(super) struct Indices {
    free: BTreeSet<u32>,
    next: u32,
    end: u32,
}

impl Indices {
    pub(super) fn new(first: u32, count: u32) -> Indices {
        Indices {
            free: BTreeSet::new(),
            next: first,
            end: first + count,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() || self.next < self.end
    }

    pub(super) fn give(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Marks an index as in use, whoever gave it out.
    pub(super) fn take(&mut self, index: u32) {
        while self.next <= index {
            self.free.insert(self.next);
            self.next += 1;
        }
        self.free.remove(&index);
    }

    pub(super) fn release(&mut self, index: u32) {
        self.free.insert(index);
    }
}
