use proptest::prelude::*;

use super::*;

fn of(source: &str, destination: &str) -> Addresses {
    Addresses::Of {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    }
}

fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = V2_SIGNATURE.to_vec();
    bytes.extend([command, family]);
    bytes.extend((rest.len() as u16).to_be_bytes());
    bytes.extend(rest);
    bytes
}

#[test]
fn version_1_is_read_to_its_line_end() {
    for (line, addresses) in [
        (
            "PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n",
            of("192.0.2.1:40000", "198.51.100.2:443"),
        ),
        (
            "PROXY TCP6 2001:db8::1 ::1 1 65535\r\n",
            of("[2001:db8::1]:1", "[::1]:65535"),
        ),
        ("PROXY UNKNOWN\r\n", Addresses::Own),
        ("PROXY UNKNOWN ff:: any thing 1 2\r\n", Addresses::Own),
    ] {
        let header = Parsed::Header {
            len: line.len(),
            addresses,
        };
        assert_eq!(parse(line.as_bytes()), header, "{line}");
        let followed = format!("{line}GET / HTTP/1.1\r\n\r\n");
        assert_eq!(parse(followed.as_bytes()), header, "{followed}");
        for len in 0..line.len() {
            assert_eq!(parse(&line.as_bytes()[..len]), Parsed::Incomplete, "{len}");
        }
    }
}

#[test]
fn version_1_is_refused_where_it_is_not_to_the_letter() {
    for line in [
        "PROXY \r\n",
        "PROXY TCP5 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY tcp4 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n",
        "PROXY TCP4 192.0.2.1  198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 65536\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 +1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 01 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2  2\r\n",
        "PROXY TCP4 192.0.2.256 198.51.100.2 1 2\r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP6 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP4 \u{e9} 198.51.100.2 1 2\r\n",
    ] {
        let parsed = parse(line.as_bytes());
        assert!(matches!(parsed, Parsed::Invalid(_)), "{line}: {parsed:?}");
    }
    let endless = format!("PROXY UNKNOWN {}", "x".repeat(200));
    assert!(matches!(parse(endless.as_bytes()), Parsed::Invalid(_)));
}

#[test]
fn version_2_without_an_address_of_the_internet_keeps_the_connections_own() {
    for (command, family, rest) in [
        (0x20, 0x00, vec![]),
        (0x20, 0x11, vec![7; 12]),
        (0x21, 0x00, vec![7; 40]),
        (0x21, 0x31, vec![7; 216]),
    ] {
        let bytes = v2(command, family, &rest);
        let header = Parsed::Header {
            len: bytes.len(),
            addresses: Addresses::Own,
        };
        assert_eq!(parse(&bytes), header, "{command:x} {family:x}");
    }
}

#[test]
fn version_2_is_as_long_as_it_says_with_its_extensions() {
    let mut rest = vec![192, 0, 2, 1, 198, 51, 100, 2, 0x9c, 0x40, 0x01, 0xbb];
    rest.extend([0x04; 300]);
    let bytes = v2(0x21, 0x11, &rest);
    let header = Parsed::Header {
        len: 16 + 312,
        addresses: of("192.0.2.1:40000", "198.51.100.2:443"),
    };
    assert_eq!(parse(&bytes), header);
    assert_eq!(parse(&bytes[..28]), header);
    for len in 0..28 {
        assert_eq!(parse(&bytes[..len]), Parsed::Incomplete, "{len}");
    }
}

#[test]
fn version_2_is_refused_where_it_is_out_of_bounds() {
    for bytes in [
        v2(0x21, 0x11, &[0; 11]),
        v2(0x21, 0x21, &[0; 35]),
        v2(0x21, 0x31, &[0; 215]),
        v2(0x21, 0x41, &[0; 300]),
        v2(0x22, 0x11, &[0; 12]),
        v2(0x11, 0x11, &[0; 12]),
        v2(0x21, 0x11, &[0; MAX_V2_BYTES]),
    ] {
        assert!(matches!(parse(&bytes), Parsed::Invalid(_)), "{bytes:x?}");
    }
}

#[test]
fn what_is_no_header_is_absent() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"PROXYING",
        b"\x16\x03\x01",
        b"\r\n\r\nGET",
        b"proxy TCP4",
    ] {
        assert_eq!(parse(bytes), Parsed::Absent, "{bytes:?}");
    }
}

#[test]
fn addresses_of_two_families_are_written_as_ipv6() {
    let client = "192.0.2.1:1".parse().unwrap();
    let dialed = "[2001:db8::1]:443".parse().unwrap();
    let v1 = header(BackendProxyProtocol::V1, client, dialed).unwrap();
    assert_eq!(v1, b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::1 1 443\r\n");
    assert_eq!(header(BackendProxyProtocol::Off, client, dialed), None);
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![
        any::<Ipv4Addr>().prop_map(IpAddr::V4),
        any::<Ipv6Addr>().prop_map(IpAddr::V6),
    ];
    (ip, any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        source in address(),
        destination in address(),
        version in prop_oneof![Just(BackendProxyProtocol::V1), Just(BackendProxyProtocol::V2)],
        behind in proptest::collection::vec(any::<u8>(), 0..20),
    ) {
        let header = header(version, source, destination).unwrap();
        prop_assert!(header.len() <= PEEK_BYTES);
        let bytes = [&header[..], &behind].concat();
        match parse(&bytes) {
            Parsed::Header { len, addresses: Addresses::Of { source: from, destination: to } } => {
                prop_assert_eq!(len, header.len());
                prop_assert_eq!(canonical(from), canonical(source));
                prop_assert_eq!(canonical(to), canonical(destination));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn no_bytes_are_read_beyond_the_bound_or_panic(
        signature in prop_oneof![Just(V1_SIGNATURE), Just(V2_SIGNATURE), Just(&[][..])],
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let bytes = [signature, &bytes].concat();
        match parse(&bytes) {
            Parsed::Header { len, .. } => prop_assert!(len <= MAX_V2_BYTES),
            Parsed::Incomplete => prop_assert!(bytes.len() < PEEK_BYTES),
            Parsed::Absent | Parsed::Invalid(_) => {}
        }
    }
}
