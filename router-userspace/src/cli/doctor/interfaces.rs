//! How layer 4 would sit on each configured interface, and why.

use super::Check;
use crate::config::{Attach, L4Config};
use crate::l4::datapath::{Hook, choose, device_of};
use crate::l4::interface::Interface;
use crate::l4::xdp_features::{self, XdpFeatures};

pub(super) fn checks(config: &L4Config) -> Vec<Check> {
    let mut checks = Vec::new();
    for name in &config.interfaces {
        let check = format!("interface {name}");
        match device_of(name, config.attach) {
            Ok(device) => {
                let features = xdp_features::of(device.index).ok();
                checks.push(hook(check, config.attach, &device, features));
                checks.extend(hints(name, config.attach, &device, features));
            }
            Err(error) => checks.push(Check::missing(
                check,
                format!("{error:#}"),
                "create it, or take it out of l4.interfaces",
            )),
        }
    }
    checks
}

/// The largest MTU whose frames are in one buffer under XDP: a page of 4096 octets without headroom
/// (256), `skb_shared_info` (320), the Ethernet header (14) and two VLAN tags (8).
const ONE_BUFFER_MTU: u32 = 3498;

/// Which hook it will be. `features` are unknown before Linux 6.3.
fn hook(name: String, attach: Attach, device: &Interface, features: Option<XdpFeatures>) -> Check {
    let choice = choose(attach, device);
    let kind = match (&device.kind, device.loopback) {
        (Some(kind), _) => kind.as_str(),
        (None, true) => "loopback",
        (None, false) => "network card",
    };
    let xdp = match features {
        Some(features) if features.native() && features.frags() => "native XDP with large frames",
        Some(features) if features.native() => "native XDP without large frames",
        Some(_) => "generic XDP only",
        None => "the kernel does not tell what XDP it can (before 6.3)",
    };
    let found = format!(
        "{} ({kind}, MTU {}): {xdp}; attach is {}: {}",
        device.name, device.mtu, choice.hooks[0], choice.reason
    );
    let native = features.is_none_or(XdpFeatures::native);
    match choice.hooks {
        [Hook::Native, ..] if native => Check::good(name, found),
        [Hook::Native] => Check::missing(
            name,
            found,
            "set l4.attach to \"auto\", or \"generic\", or use a card whose driver has XDP",
        ),
        [Hook::Native, ..] => Check::hint(
            name,
            format!("{found}; generic in its place, several times as costly"),
            "use a card whose driver has XDP",
        ),
        _ => Check::good(name, found),
    }
}

fn hints(
    interface: &str,
    attach: Attach,
    device: &Interface,
    features: Option<XdpFeatures>,
) -> Vec<Check> {
    let mut hints = Vec::new();
    if !device.up {
        hints.push(Check::hint(
            format!("interface {interface}"),
            "is down",
            format!("ip link set {} up", device.name),
        ));
    }
    let xdp = choose(attach, device).hooks[0] == Hook::Native;
    if xdp && features.is_none() && device.mtu > ONE_BUFFER_MTU {
        hints.push(Check::hint(
            format!("interface {interface}"),
            "native XDP before Linux 6.3 loses frames of more than one buffer on their way to another \
             interface",
            format!("set l4.attach to \"tcx\", or an MTU of at most {ONE_BUFFER_MTU}"),
        ));
    }
    if xdp && device.kind.as_deref() == Some("veth") {
        hints.push(Check::hint(
            format!("interface {interface}"),
            "a veth leaves checksums to whoever receives, by a mark that is lost in native XDP",
            format!(
                "set l4.attach to \"auto\" or \"tcx\"; or ethtool -K {} tx off rx off, and at its \
                 other end",
                device.name
            ),
        ));
        if features.is_some_and(|features| !features.redirect_target()) {
            hints.push(Check::hint(
                format!("interface {interface}"),
                "frames sent out of this veth by XDP are lost: its other end does not receive them",
                "attach an XDP program to the other end that passes every packet",
            ));
        }
    }
    hints
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn device(kind: Option<&str>) -> Interface {
        Interface {
            name: "eth0".to_owned(),
            kind: kind.map(str::to_owned),
            mtu: 1500,
            up: true,
            ..Interface::default()
        }
    }

    #[test]
    fn a_card_without_native_xdp_is_a_hint_unless_native_is_asked_for() {
        let verdict =
            |attach, features| hook("eth0".to_owned(), attach, &device(None), features).verdict;
        let (full, none) = (XdpFeatures::from_bits(0x27), XdpFeatures::from_bits(0));
        assert_eq!(verdict(Attach::Auto, Some(full)), Verdict::Good);
        assert_eq!(verdict(Attach::Auto, None), Verdict::Good);
        assert_eq!(verdict(Attach::Auto, Some(none)), Verdict::Hint);
        assert_eq!(verdict(Attach::Native, Some(none)), Verdict::Missing);
        assert_eq!(verdict(Attach::Generic, Some(none)), Verdict::Good);
    }

    #[test]
    fn auto_says_why_a_veth_gets_the_classifier() {
        let check = hook(
            "veth0".to_owned(),
            Attach::Auto,
            &device(Some("veth")),
            None,
        );
        assert!(check.found.contains("attach is tcx"), "{}", check.found);
        assert!(check.found.contains("checksums"), "{}", check.found);
    }

    #[test]
    fn large_frames_on_an_old_kernel_are_warned_of() {
        let of = |attach, mtu, features| {
            let device = Interface {
                mtu,
                ..device(None)
            };
            hints("eth0", attach, &device, features).len()
        };
        let known = Some(XdpFeatures::from_bits(0x27));
        assert_eq!(of(Attach::Auto, 9000, None), 1);
        assert_eq!(of(Attach::Auto, 3498, None), 0);
        assert_eq!(of(Attach::Auto, 9000, known), 0);
        assert_eq!(of(Attach::Tcx, 9000, None), 0);
    }

    #[test]
    fn native_on_a_veth_is_warned_of() {
        let silent = Some(XdpFeatures::from_bits(0b011));
        let hints = hints("veth0", Attach::Native, &device(Some("veth")), silent);
        assert_eq!(hints.len(), 2);
        assert!(hints[0].remedy.contains("ethtool -K eth0 tx off"));
    }
}
