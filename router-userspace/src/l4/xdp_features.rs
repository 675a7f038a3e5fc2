//! What a network driver can do with XDP, asked without touching it.
//!
//! For `viaduct doctor`. The kernel tells by its generic netlink family "netdev" (Linux 6.3;
//! Documentation/netlink/specs/netdev.yaml).

use std::io;

use anyhow::{Context, bail};
use rtnetlink::packet_core::NlasIterator;
use rtnetlink::sys::{Socket, SocketAddr};

/// Kernel: include/uapi/linux/{netlink,genetlink,netdev}.h.
const NETLINK_GENERIC: isize = 16;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const MESSAGE_HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;

/// Bits of `enum netdev_xdp_act`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpFeatures(u64);

impl XdpFeatures {
    #[cfg(test)]
    pub fn from_bits(bits: u64) -> XdpFeatures {
        XdpFeatures(bits)
    }

    /// Native programs that drop, pass, send back and redirect.
    pub fn native(self) -> bool {
        self.0 & 0b011 == 0b011
    }

    /// Frames that others redirect to it. A veth says so while its other end receives them.
    pub fn redirect_target(self) -> bool {
        self.0 & 0b100 != 0
    }

    /// Frames larger than a page.
    pub fn frags(self) -> bool {
        self.0 & 1 << 5 != 0
    }
}

/// # Errors
/// The kernel is older than 6.3, or there is no such interface.
pub fn of(ifindex: u32) -> anyhow::Result<XdpFeatures> {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    let answer = ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name).context("find netdev's family")?;
    let family: [u8; 2] = find(&answer, CTRL_ATTR_FAMILY_ID).context("netdev has no number")?;
    let index = attribute(NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
    let answer = ask(u16::from_ne_bytes(family), NETDEV_CMD_DEV_GET, &index)
        .with_context(|| format!("ask netdev about interface {ifindex}"))?;
    let features = find(&answer, NETDEV_A_DEV_XDP_FEATURES).context("netdev tells nothing")?;
    Ok(XdpFeatures(u64::from_ne_bytes(features)))
}

/// The attributes of the answer.
fn ask(family: u16, command: u8, attributes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let length = (MESSAGE_HEADER + GENERIC_HEADER + attributes.len()) as u32;
    let mut request = Vec::new();
    request.extend(length.to_ne_bytes());
    request.extend(family.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and sender, which one question does without; version 1 of the command.
    request.extend([0; 8]);
    request.extend([command, 1, 0, 0]);
    request.extend(attributes);

    let mut socket = Socket::new(NETLINK_GENERIC).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let kind: [u8; 2] = field(&answer, 4)?;
    if u16::from_ne_bytes(kind) == NLMSG_ERROR {
        let code = i32::from_ne_bytes(field(&answer, MESSAGE_HEADER)?);
        return Err(io::Error::from_raw_os_error(-code).into());
    }
    let length = u32::from_ne_bytes(field(&answer, 0)?) as usize;
    let attributes = answer.get(MESSAGE_HEADER + GENERIC_HEADER..length);
    Ok(attributes.context("a short answer")?.to_owned())
}

fn field<const N: usize>(message: &[u8], offset: usize) -> anyhow::Result<[u8; N]> {
    let field = message.get(offset..).and_then(|rest| rest.first_chunk());
    field.copied().context("a short answer")
}

/// Padded to four octets.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut attribute = Vec::new();
    attribute.extend(length.to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn find<const N: usize>(attributes: &[u8], kind: u16) -> anyhow::Result<[u8; N]> {
    for found in NlasIterator::new(attributes) {
        let found = found.context("read attributes")?;
        if found.kind() == kind {
            let value = found.value().try_into();
            return value.context("an attribute of another length");
        }
    }
    bail!("no attribute {kind}")
}
