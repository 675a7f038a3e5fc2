//! How many requests a backend or a route may have in flight, and who waits for room.
//!
//! Each worker counts what it has in flight in a shard of its own and sums all shards only where a
//! limit or a balance asks for it, so a request of a route without limits writes nothing that another
//! core reads. Who finds no room waits in the [`Queue`] of its pool, one for each worker; whoever
//! leaves wakes the first of each queue that was ever full for it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::l7::metrics::Counter;

/// What a backend or a route has in flight, over all workers.
#[derive(Debug)]
pub(super) struct InFlight {
    shards: Box<[Shard]>,
    /// Somebody has waited for room, so that whoever leaves has to look at `queues`.
    contended: AtomicBool,
    queues: ArcSwap<Vec<Weak<Queue>>>,
}

/// A worker's count, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard(Counter);

impl InFlight {
    pub(super) fn new(workers: usize) -> InFlight {
        InFlight {
            shards: (0..workers).map(|_| Shard::default()).collect(),
            contended: AtomicBool::new(false),
            queues: ArcSwap::default(),
        }
    }

    pub(super) fn workers(&self) -> usize {
        self.shards.len()
    }

    pub(super) fn of_worker(&self, worker: usize) -> u64 {
        self.shards[worker].0.read()
    }

    pub(super) fn total(&self) -> u64 {
        self.shards.iter().map(|shard| shard.0.read()).sum()
    }

    /// Whether one more may enter; 0 is no limit.
    pub(super) fn has_room(&self, limit: u32) -> bool {
        limit == 0 || self.total() < u64::from(limit)
    }

    /// Counts one more for this worker unless there are `limit` (0: no limit). They are never more,
    /// though of two workers that come at once for the last place neither may get it; both are woken
    /// for it if they wait.
    pub(super) fn try_enter(&self, worker: usize, limit: u32) -> bool {
        if !self.has_room(limit) {
            return false;
        }
        self.shards[worker].0.add(1);
        if limit == 0 {
            return true;
        }
        // Of two workers that count and then sum, at least one sees the other.
        fence(Ordering::SeqCst);
        if self.total() > u64::from(limit) {
            self.leave(worker);
            return false;
        }
        true
    }

    pub(super) fn leave(&self, worker: usize) {
        self.shards[worker].0.subtract(1);
        if self.contended.load(Ordering::Relaxed) {
            // Either this sees who waits, or who waits sees the room.
            fence(Ordering::SeqCst);
            for queue in self.queues.load().iter().filter_map(Weak::upgrade) {
                queue.wake_first();
            }
        }
    }

    /// From here on, whoever leaves wakes the first of `queue`.
    pub(super) fn wakes(&self, queue: &Arc<Queue>) {
        self.queues.rcu(|queues| {
            let live = queues.iter().filter(|queue| queue.strong_count() > 0);
            let mut queues: Vec<_> = live.cloned().collect();
            let queue = Arc::downgrade(queue);
            if !queues.iter().any(|known| known.ptr_eq(&queue)) {
                queues.push(queue);
            }
            queues
        });
        self.contended.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// The requests of one pool and worker that wait for room, first come, first served.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: AtomicU32,
    room: Notify,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    /// A place in the queue, unless `capacity` are in it.
    pub(super) fn join(self: &Arc<Queue>, capacity: usize) -> Option<Place> {
        // Only the worker that owns the queue lets anybody in.
        let waiting = self.waiting.load(Ordering::Relaxed);
        if waiting as usize >= capacity {
            return None;
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Some(Place(Arc::clone(self)))
    }

    fn wake_first(&self) {
        if !self.is_empty() {
            self.room.notify_one();
        }
    }

    /// There may be room for another reason than that somebody left.
    pub(super) fn wake_all(&self) {
        if !self.is_empty() {
            self.room.notify_waiters();
        }
    }
}

/// A request's place in a [`Queue`], given up when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Queue>);

impl Place {
    /// Waits until there may be room; false if there is none until `deadline`.
    pub(super) async fn room(&self, deadline: Instant) -> bool {
        let room = self.0.room.notified();
        tokio::time::timeout_at(deadline, room).await.is_ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
