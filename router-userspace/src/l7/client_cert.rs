//! `X-Forwarded-Client-Cert`: what applications are told of the certificate that a client has shown.
//!
//! Pure. The value is made once a connection, by [`crate::l7::handshake`]; what becomes of the header is
//! asked for each request.

use data_encoding::{BASE64, HEXLOWER};
use http::HeaderValue;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::config::{ClientCertFormat, ForwardedClientCert};

/// What to do with a request's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClientCertHeader {
    Keep,
    Remove,
    Set(HeaderValue),
}

/// `trusted` is whether the peer is in `http.trusted_proxies`, `shown` the value for the certificate
/// that it has shown and that was verified.
pub(super) fn forwarded(
    mode: ForwardedClientCert,
    trusted: bool,
    shown: Option<&HeaderValue>,
) -> ClientCertHeader {
    match (mode, shown) {
        (ForwardedClientCert::AlwaysForward, _) if trusted => ClientCertHeader::Keep,
        (ForwardedClientCert::Forward, Some(_)) => ClientCertHeader::Keep,
        (ForwardedClientCert::SanitizeSet, Some(value)) => ClientCertHeader::Set(value.clone()),
        _ => ClientCertHeader::Remove,
    }
}

/// The value for a certificate in DER.
pub(super) fn value(format: ClientCertFormat, certificate: &[u8]) -> HeaderValue {
    let text = match format {
        ClientCertFormat::Base64 => BASE64.encode(certificate),
        ClientCertFormat::HashSubject => hash_and_subject(certificate),
    };
    HeaderValue::try_from(text).expect("visible ASCII is a header value")
}

fn hash_and_subject(certificate: &[u8]) -> String {
    let hash = ring::digest::digest(&ring::digest::SHA256, certificate);
    let hash = HEXLOWER.encode(hash.as_ref());
    let subject = match X509Certificate::from_der(certificate) {
        Ok((_, certificate)) => quoted(&certificate.subject().to_string()),
        // Verified, so of a kind that the one parser knows and the other does not.
        Err(_) => String::new(),
    };
    format!("Hash={hash};Subject=\"{subject}\"")
}

/// The text between double quotes, which it cannot end; what is not visible ASCII becomes `?`.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            ' '..='~' => quoted.push(character),
            _ => quoted.push('?'),
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn each_mode_does_what_gorouters_does_but_for_untrusted_peers() {
        use ClientCertHeader::{Keep, Remove, Set};
        use ForwardedClientCert::{AlwaysForward, Forward, SanitizeSet};
        let shown = HeaderValue::from_static("cert");
        for (mode, trusted, is_shown, wanted) in [
            (AlwaysForward, true, false, Keep),
            (AlwaysForward, true, true, Keep),
            (AlwaysForward, false, true, Remove),
            (Forward, true, false, Remove),
            (Forward, false, true, Keep),
            (SanitizeSet, true, false, Remove),
            (SanitizeSet, false, true, Set(shown.clone())),
        ] {
            let header = forwarded(mode, trusted, is_shown.then_some(&shown));
            assert_eq!(header, wanted, "{mode:?} {trusted} {is_shown}");
        }
    }

    fn certificate(common_name: &str) -> rcgen::Certificate {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    #[test]
    fn a_certificate_is_pem_without_its_armour() {
        let certificate = certificate("app");
        let pem = certificate.pem();
        let lines = pem.lines().filter(|line| !line.starts_with("-----"));
        let bare: String = lines.collect();
        assert_eq!(value(ClientCertFormat::Base64, certificate.der()), bare);
    }

    #[test]
    fn a_subject_cannot_end_its_quotes_or_the_header() {
        let certificate = certificate("a\";Hash=\"\\b\r\nX: \u{e9}");
        let value = value(ClientCertFormat::HashSubject, certificate.der());
        let text = value.to_str().unwrap();
        let hash = ring::digest::digest(&ring::digest::SHA256, certificate.der());
        let hash = HEXLOWER.encode(hash.as_ref());
        let subject = r#"CN=a\";Hash=\"\\b??X: ?"#;
        assert!(
            text.starts_with(&format!("Hash={hash};Subject=\"")),
            "{text}"
        );
        assert!(text.contains(subject), "{text}");
    }
}
