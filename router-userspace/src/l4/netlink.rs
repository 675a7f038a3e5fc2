//! One question or order to rtnetlink, and its answer, at once.
//!
//! For what is asked rarely and must be done before going on: `interface`, `clsact` and
//! `local_routes`. Whoever follows changes has a task of its own (`next_hop`).

use anyhow::Context;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

/// Marks the neighbours and routes that this program made; of the numbers that nobody has
/// (include/uapi/linux/rtnetlink.h, `RTPROT_*`).
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(0xd7);

/// Messages are padded to this (kernel: include/uapi/linux/netlink.h, `NLMSG_ALIGNTO`).
const ALIGNMENT: usize = 4;

/// What there is of a kind.
pub(super) fn dump(message: RouteNetlinkMessage) -> anyhow::Result<Vec<RouteNetlinkMessage>> {
    request(message, NLM_F_DUMP)
}

/// Hands over a message; what is answered beside the acknowledgement.
///
/// # Errors
/// The kernel's refusal, as an [`std::io::Error`] at the root.
pub(super) fn send(
    message: RouteNetlinkMessage,
    flags: u16,
) -> anyhow::Result<Vec<RouteNetlinkMessage>> {
    request(message, NLM_F_ACK | flags)
}

fn request(message: RouteNetlinkMessage, flags: u16) -> anyhow::Result<Vec<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut request = NetlinkMessage::new(header, message.into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);

    let mut socket = Socket::new(NETLINK_ROUTE).context("open a rtnetlink socket")?;
    socket.bind_auto().context("bind a rtnetlink socket")?;
    let kernel = SocketAddr::new(0, 0);
    socket.connect(&kernel).context("connect to rtnetlink")?;
    socket.send(&bytes, 0).context("ask rtnetlink")?;
    let mut answers = Vec::new();
    loop {
        let (received, _) = socket.recv_from_full().context("hear from rtnetlink")?;
        if take_in(&received, &mut answers)? {
            return Ok(answers);
        }
    }
}

/// True at the end of the answer.
fn take_in(received: &[u8], answers: &mut Vec<RouteNetlinkMessage>) -> anyhow::Result<bool> {
    let mut rest = received;
    while !rest.is_empty() {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
            .context("read rtnetlink's answer")?;
        let length = (message.header.length as usize).next_multiple_of(ALIGNMENT);
        rest = rest.get(length..).unwrap_or_default();
        match message.payload {
            NetlinkPayload::InnerMessage(answer) => answers.push(answer),
            NetlinkPayload::Error(error) if error.code.is_some() => {
                return Err(error.to_io()).context("rtnetlink refuses");
            }
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(true),
            _ => {}
        }
    }
    Ok(false)
}
