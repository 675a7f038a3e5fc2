//! The subjects that are listened to: what a message is about, and who published it.

use crate::route::Origin;
use crate::route::ownership::Claimant;

pub(super) struct Subjects {
    pub register: String,
    pub unregister: String,
    /// `<prefix>.*.*`: registrations and withdrawals in one, so that they keep their order.
    pub owned: String,
    pub greet: String,
    pub start: String,
}

/// What a message is about, by its subject.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Register,
    Unregister,
    Greet,
    Other,
}

impl Subjects {
    /// Says who publishes, too. A subject that owns hosts is named by its registrations, in withdrawals
    /// as well.
    pub(super) fn read<'s>(&self, subject: &'s str, owner: &'s mut String) -> (Kind, Claimant<'s>) {
        for (own, kind) in [
            (&self.register, Kind::Register),
            (&self.unregister, Kind::Unregister),
            (&self.greet, Kind::Greet),
        ] {
            let Some(rest) = subject.strip_prefix(&**own) else {
                continue;
            };
            if rest.is_empty() {
                return (kind, Claimant::Source(Origin::Nats));
            }
            if rest.starts_with('.') && kind != Kind::Greet {
                owner.extend([&*self.register, rest]);
                return (kind, Claimant::Subject(owner));
            }
        }
        (Kind::Other, Claimant::Source(Origin::Nats))
    }

    pub(super) fn new(prefix: &str) -> Subjects {
        let subject = |name: &str| format!("{prefix}.{name}");
        Subjects {
            register: subject("register"),
            unregister: subject("unregister"),
            owned: subject("*.*"),
            greet: subject("greet"),
            start: subject("start"),
        }
    }
}
