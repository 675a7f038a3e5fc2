//! The ring of one VIP, and where the flows of slots that changed may still be.
//!
//! See [`RingSlot`]: a slot is quiet until its backend changes, then remembers the one it was quiet
//! with until older flows are over, and is quiet again once no flow is elsewhere. Schedulers and modes
//! that ask the flow table for every packet need none of that.

use std::collections::BTreeSet;
use std::time::Instant;

use router_common::{RING_SIZE, RingSlot};

use crate::l4::maglev::{self, Member};
use crate::l4::round_robin;

/// What a ring is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) kind: Kind,
    /// Whether flows of a quiet slot are in the ring alone.
    pub(super) remembers: bool,
    /// In the order of their addresses.
    pub(super) members: Vec<Member>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Maglev,
    /// A cycle of turns, over and over.
    Cycle,
}

pub(super) struct Ring {
    /// Empty until there is something to write.
    slots: Box<[RingSlot]>,
    built: Option<Plan>,
    len: u32,
    /// Slots that remember a backend, with when they may forget it.
    remembering: Vec<(Instant, Vec<u16>)>,
    /// Whether a slot may have [`RingSlot::NOBODY`].
    unquiet: bool,
    /// Whether it changed since [`Self::settle`] last looked.
    changed: bool,
}

impl Ring {
    pub(super) fn new() -> Ring {
        Ring {
            slots: Box::default(),
            built: None,
            len: RING_SIZE as u32,
            remembering: Vec::new(),
            unquiet: false,
            changed: false,
        }
    }

    /// As the kernel has it, but for ids that are not `known`. What slots remember, they may forget
    /// `over`.
    pub(super) fn adopt(
        slots: &[RingSlot],
        len: u32,
        remembers: bool,
        known: impl Fn(u32) -> bool,
        over: Instant,
    ) -> Ring {
        let mut ring = Ring::new();
        let mut remembering = Vec::new();
        let sound = slots.iter().enumerate().map(|(i, slot)| {
            let current = match slot.current() {
                id if known(id) => id,
                _ => 0,
            };
            let previous = match slot.previous() {
                0 => 0,
                id if known(id) => {
                    remembering.push(i as u16);
                    id
                }
                _ => RingSlot::NOBODY,
            };
            RingSlot::new(current, previous)
        });
        ring.slots = sound.collect();
        ring.len = len;
        ring.unquiet = ring
            .slots
            .iter()
            .any(|slot| slot.previous() == RingSlot::NOBODY);
        ring.remembering.push((over, remembering));
        ring.changed = true;
        ring.built = Some(Plan {
            kind: Kind::Maglev,
            remembers,
            members: Vec::new(),
        });
        ring
    }

    pub(super) fn slots(&self) -> &[RingSlot] {
        &self.slots
    }

    /// Slots in use.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Backends in the ring.
    pub(super) fn backends(&self) -> u32 {
        self.built
            .as_ref()
            .map_or(0, |built| built.members.len() as u32)
    }

    /// The backends that flows may be on of which only the ring knows.
    pub(super) fn remembered(&self) -> BTreeSet<u32> {
        self.slots.iter().map(|slot| slot.previous()).collect()
    }

    /// Builds the ring anew if the plan is another; says whether slots changed. What slots begin to
    /// remember, they may forget `over`.
    pub(super) fn set(&mut self, plan: Plan, over: Instant) -> bool {
        if self.built.as_ref() == Some(&plan) {
            return false;
        }
        let remembered = self.built.as_ref().is_some_and(|built| built.remembers);
        let next = self.next_slots(&plan, remembered);
        let began = |(old, new): (&RingSlot, &RingSlot)| old.is_quiet() && !new.is_quiet();
        let began: Vec<u16> = (0u16..)
            .zip(self.slots.iter().zip(&next))
            .filter_map(|(i, pair)| began(pair).then_some(i))
            .collect();
        if !plan.remembers {
            self.remembering.clear();
            self.unquiet = false;
        } else if !began.is_empty() {
            self.remembering.push((over, began));
        }
        self.built = Some(plan);
        self.changed = true;
        let changed = next != self.slots;
        self.slots = next;
        changed
    }

    fn next_slots(&mut self, plan: &Plan, remembered: bool) -> Box<[RingSlot]> {
        let targets = match plan.kind {
            Kind::Maglev => maglev::ring(&plan.members),
            Kind::Cycle => self.cycle(&plan.members),
        };
        let remembers = plan.remembers && remembered && !self.slots.is_empty();
        let Some(targets) = targets else {
            // Nobody takes new flows; where the old ones are is kept.
            let slots = self.slots.iter().map(|slot| match remembers {
                true => turned(*slot, slot.current()),
                false => *slot,
            });
            return slots.collect();
        };
        if plan.kind == Kind::Maglev {
            self.len = RING_SIZE as u32;
        }
        if !remembers {
            return targets.iter().map(|&id| RingSlot::new(id, 0)).collect();
        }
        let slots = self.slots.iter().zip(&targets);
        slots
            .map(|(slot, &id)| match slot.current() == id {
                true => *slot,
                false => turned(*slot, id),
            })
            .collect()
    }

    /// The whole ring is filled, so that it is sound for whatever length the program goes by.
    fn cycle(&mut self, members: &[Member]) -> Option<Box<[u32]>> {
        let cycle = round_robin::cycle(members);
        if cycle.is_empty() {
            return None;
        }
        self.len = cycle.len() as u32;
        Some(cycle.iter().copied().cycle().take(RING_SIZE).collect())
    }

    /// Has no slot name backends that are about to be cleared; says whether slots changed.
    pub(super) fn forget(&mut self, ids: &BTreeSet<u32>) -> bool {
        let mut changed = false;
        for slot in &mut self.slots {
            let current = match ids.contains(&slot.current()) {
                true => 0,
                false => slot.current(),
            };
            let previous = match ids.contains(&slot.previous()) {
                true => RingSlot::NOBODY,
                false => slot.previous(),
            };
            let next = RingSlot::new(current, previous);
            changed |= next != *slot;
            self.unquiet |= previous == RingSlot::NOBODY;
            *slot = next;
        }
        changed
    }

    /// Has slots forget backends whose older flows are over; says whether slots changed.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for (_, slots) in self.remembering.extract_if(.., |(over, _)| *over <= now) {
            for i in slots {
                let slot = &mut self.slots[usize::from(i)];
                if !slot.is_quiet() && slot.previous() != RingSlot::NOBODY {
                    *slot = RingSlot::new(slot.current(), RingSlot::NOBODY);
                    self.unquiet = true;
                    changed = true;
                }
            }
        }
        changed
    }

    /// Whether the ring is the one that the sweep counted by; asked once after each sweep.
    pub(super) fn is_settled(&mut self) -> bool {
        !std::mem::take(&mut self.changed)
    }

    /// Makes quiet what remembers nobody, since no flow is elsewhere; says whether slots changed.
    pub(super) fn quiet(&mut self) -> bool {
        if !std::mem::take(&mut self.unquiet) {
            return false;
        }
        let slots = &self.slots;
        self.remembering.retain_mut(|(_, remembering)| {
            remembering.retain(|i| slots[usize::from(*i)].previous() != RingSlot::NOBODY);
            !remembering.is_empty()
        });
        for slot in &mut self.slots {
            if slot.previous() == RingSlot::NOBODY {
                *slot = RingSlot::new(slot.current(), 0);
            }
        }
        true
    }
}

/// A slot with a new backend, that knows where its older flows are.
fn turned(slot: RingSlot, current: u32) -> RingSlot {
    match slot.is_quiet() {
        true => RingSlot::new(current, slot.current()),
        false => RingSlot::new(current, slot.previous()),
    }
}
