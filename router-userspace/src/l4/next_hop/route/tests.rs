use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn backend() -> IpAddr {
    "2001:db8::11".parse().unwrap()
}

fn route(ifindex: u32) -> Route {
    Route {
        ifindex,
        neighbour: backend(),
        source: "2001:db8::1".parse().unwrap(),
        mtu: None,
    }
}

/// eth0 (2), eth0.100 on it (3), and a VLAN on that (4).
fn interfaces() -> HashMap<u32, Interface> {
    let device = |index: u32, lower, vlan| Interface {
        index,
        mac: Some([2, 0, 0, 0, 0, index as u8]),
        mtu: 1500,
        lower,
        vlan,
        ..Interface::default()
    };
    [
        device(2, None, None),
        device(3, Some(2), Some(100)),
        device(4, Some(3), Some(7)),
    ]
    .map(|device| (device.index, device))
    .into()
}

#[test]
fn a_backend_on_the_link_is_its_own_next_hop() {
    let hop = next_hop(backend(), route(2), MAC, &interfaces()).unwrap();
    let expected = NextHop {
        ifindex: 2,
        source_mac: [2, 0, 0, 0, 0, 2],
        destination_mac: MAC,
        source: "2001:db8::1".parse().unwrap(),
        mtu: 1500,
        vlan: 0,
        on_link: true,
    };
    assert_eq!(hop, expected);
}

#[test]
fn a_routed_backend_is_not_on_the_link() {
    let route = Route {
        neighbour: "fe80::1".parse().unwrap(),
        ..route(2)
    };
    assert!(
        !next_hop(backend(), route, MAC, &interfaces())
            .unwrap()
            .on_link
    );
}

#[test]
fn frames_for_a_vlan_leave_by_the_device_below_with_its_tag() {
    let hop = next_hop(backend(), route(3), MAC, &interfaces()).unwrap();
    assert_eq!((hop.ifindex, hop.vlan), (2, 100));
    assert_eq!(hop.source_mac, [2, 0, 0, 0, 0, 3]);
    assert_eq!(next_hop(backend(), route(4), MAC, &interfaces()), None);
}

#[test]
fn the_mtu_is_the_lesser_of_route_and_device() {
    let mtu = |of_route, of_device| {
        let route = Route {
            mtu: of_route,
            ..route(2)
        };
        let mut interfaces = interfaces();
        interfaces.get_mut(&2).unwrap().mtu = of_device;
        next_hop(backend(), route, MAC, &interfaces).unwrap().mtu
    };
    assert_eq!(mtu(None, 1500), 1500);
    assert_eq!(mtu(Some(1400), 1500), 1400);
    assert_eq!(mtu(Some(9000), 1500), 1500);
    assert_eq!(mtu(None, 65_536), u16::MAX);
}

#[test]
fn a_route_is_read_with_its_gateway_source_and_mtu() {
    let mut answer = RouteMessage::default();
    answer.header.kind = RouteType::Unicast;
    answer.attributes = vec![
        RouteAttribute::Oif(2),
        RouteAttribute::Gateway(RouteAddress::Inet6("fe80::1".parse().unwrap())),
        RouteAttribute::PrefSource(RouteAddress::Inet6("2001:db8::1".parse().unwrap())),
        RouteAttribute::Metrics(vec![RouteMetric::Mtu(1280)]),
    ];
    let expected = Route {
        neighbour: "fe80::1".parse().unwrap(),
        mtu: Some(1280),
        ..route(2)
    };
    assert_eq!(read_route(&answer, backend()), Some(expected));
    answer.header.kind = RouteType::Local;
    assert_eq!(read_route(&answer, backend()), None);
}
