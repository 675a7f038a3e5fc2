//! What the XDP program decided about a packet, and why.

/// Declares the verdicts once: index of the counter, name in the API and metrics, what it means.
macro_rules! verdicts {
    ($($(#[doc = $doc:literal])* $name:ident => $text:literal,)*) => {
        /// One decision of the XDP program. Its number is the index of its counter in `VERDICTS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Verdict { $($(#[doc = $doc])* $name,)* }

        impl Verdict {
            pub const ALL: &'static [Verdict] = &[$(Verdict::$name,)*];

            /// The name in `viaduct stats`, the API and the metric label.
            pub const fn name(self) -> &'static str {
                match self { $(Verdict::$name => $text,)* }
            }
        }
    };
}

verdicts! {
    /// Passed: for no VIP and from no backend.
    NotForUs => "not_for_us",
    /// Passed: for an address of a VIP or of the gateway, but no port and protocol of a VIP.
    NoSuchVip => "no_such_vip",
    /// Passed: from a backend to the gateway, but part of no flow.
    NotAReply => "not_a_reply",
    /// Forwarded to the backend of a known flow.
    Forwarded => "forwarded",
    /// Forwarded, and the flow is new.
    NewFlow => "new_flow",
    /// A backend's answer forwarded to its client.
    Replied => "replied",
    /// Dropped: a header is cut short or contradicts itself.
    Malformed => "malformed",
    /// Dropped: a fragment to a VIP; only the first carries ports.
    Fragment => "fragment",
    /// Dropped: the time to live ran out here (RFC 791).
    TtlExpired => "ttl_expired",
    /// Dropped: the VIP has no backend that takes new flows.
    NoBackend => "no_backend",
    /// Dropped: TCP in the middle of a connection that is not in the flow table.
    UnknownFlow => "unknown_flow",
    /// Dropped: no free place in the flow table.
    FlowTableFull => "flow_table_full",
    /// Dropped: no free gateway port towards the backend.
    PortsExhausted => "ports_exhausted",
    /// Dropped: another core changed the same place of the flow table in this very moment.
    Contended => "contended",
    /// Dropped: the program's own tables contradict each other; never seen in a sound build.
    Internal => "internal",
}

impl Verdict {
    /// How many there are, which is how many counters `VERDICTS` holds.
    pub const COUNT: u32 = Verdict::ALL.len() as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_index_of_its_counter() {
        for (index, &verdict) in Verdict::ALL.iter().enumerate() {
            assert_eq!(verdict as usize, index);
        }
    }
}
