//! A CA and the certificates that two hosts' QEMUs need, as the pool makes them: ECDSA P-256,
//! `CN=host` as the only part of the name, `host.qemu.whimbrel` as the alternative name.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};

/// The CA of one pool.
pub(crate) struct Pool {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pool {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = name("pool");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self { ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    /// A folder with all that the QEMUs of one host need.
    pub(crate) fn credentials(&self, parent: &Path, host: &str) -> PathBuf {
        let dir = parent.join(format!("tls-{host}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("ca-cert.pem"), self.ca.pem()).unwrap();
        let roles = [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ];
        for (role, usage) in roles {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![format!("{host}.qemu.whimbrel")]).unwrap();
            params.distinguished_name = name(host);
            params.key_usages =
                vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![usage];
            let certificate = params.signed_by(&key, &self.ca).unwrap();
            fs::write(dir.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
            fs::write(dir.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
        }
        dir
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}
