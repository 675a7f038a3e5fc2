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
    /// Passed: for a VIP that the proxy on this host serves.
    HandedUp => "handed_up",
    /// Forwarded to the backend of a known flow.
    Forwarded => "forwarded",
    /// Forwarded, and the flow is new.
    NewFlow => "new_flow",
    /// Forwarded to the backend that the ring names, since the flow table had no place for the flow.
    Untracked => "untracked",
    /// A backend's answer forwarded to its client.
    Replied => "replied",
    /// An ICMP error forwarded to the end whose packet it quotes.
    ErrorForwarded => "error_forwarded",
    /// Forwarded: a health check of this host's, to the backend that it is for.
    Probed => "probed",
    /// Answered: an ICMP echo request to a VIP.
    EchoAnswered => "echo_answered",
    /// Answered: no backend takes new flows; RST, or ICMP port unreachable.
    Rejected => "rejected",
    /// Answered: it does not fit on the way to the backend; ICMP fragmentation needed, packet too big.
    TooBig => "too_big",
    /// Answered: new flows come too fast, so the client must show that it exists (RFC 9293 §3.5.1).
    Challenged => "challenged",
    /// Translated: not a packet, but a connection or the first datagram of a client on this host.
    Translated => "translated",
    /// Dropped: a client's answer to a challenge; its next SYN passes.
    Proven => "proven",
    /// Dropped: a header is cut short or contradicts itself.
    Malformed => "malformed",
    /// Dropped: a fragment whose first one, with the ports, has not come by.
    Fragment => "fragment",
    /// Dropped: the time to live ran out here (RFC 791).
    TtlExpired => "ttl_expired",
    /// Dropped: the VIP has no backend that takes new flows.
    NoBackend => "no_backend",
    /// Dropped: TCP in the middle of a connection that is not in the flow table.
    UnknownFlow => "unknown_flow",
    /// Dropped: no free place in the flow table, which these modes cannot do without.
    FlowTableFull => "flow_table_full",
    /// Dropped: no free gateway port towards the backend.
    PortsExhausted => "ports_exhausted",
    /// Dropped: the VIP does not take this source.
    SourceDenied => "source_denied",
    /// Dropped: more new flows a second than the VIP takes, from this source or in all.
    RateLimited => "rate_limited",
    /// Dropped: it does not fit on the way to the backend and may not be answered.
    DoesNotFit => "does_not_fit",
    /// Dropped: an ICMP error that quotes no flow of ours.
    UnknownError => "unknown_error",
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
