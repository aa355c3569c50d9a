"""The firmware's own blobs: SEV certificate, launch session, secret packet header, attestation report.

Layouts are those of AMD's SEV tool and of virtee's sev crate (facts only); all integers little-endian, everything
packed. The certificate is AMD's own format, not X.509: 16 bytes of head, a public key that fills 1028 bytes
whatever its kind, and two signatures of 520 bytes each: 2084 bytes. AMD's own two certificates above it (ASK, ARK) have
a third form: a head of 64 bytes, then public exponent, modulus and signature, as long as the head says.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure as Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32

# Usage of a key.
SEV_USAGE_ARK = 0x0000
SEV_USAGE_ASK = 0x0013
SEV_USAGE_INVALID = 0x1000
SEV_USAGE_OCA = 0x1001
SEV_USAGE_PEK = 0x1002
SEV_USAGE_PDH = 0x1003
SEV_USAGE_CEK = 0x1004

# Algorithms.
SEV_ALGO_INVALID = 0x0000
SEV_ALGO_RSA_SHA256 = 0x0001
SEV_ALGO_ECDSA_SHA256 = 0x0002
SEV_ALGO_ECDH_SHA256 = 0x0003
SEV_ALGO_RSA_SHA384 = 0x0101
SEV_ALGO_ECDSA_SHA384 = 0x0102
SEV_ALGO_ECDH_SHA384 = 0x0103

SEV_CURVE_P256 = 1
SEV_CURVE_P384 = 2

SEV_CERT_VERSION = 1
SEV_CERT_SIZE = 2084
SEV_CERT_BODY_SIZE = 1044
"""What a signature covers: everything before the first signature."""

SEV_SESSION_SIZE = 128
SEV_SECRET_HEADER_SIZE = 52
SEV_ATTESTATION_REPORT_SIZE = 208
SEV_SECRET_FLAG_COMPRESSED = 1 << 0


class sev_ecc_pubkey(Structure):
    """A point on a curve: little-endian coordinates, zero-filled to 72 bytes; 1028 bytes with the rest of the field."""

    _pack_ = 1
    _fields_ = [("curve", u32), ("qx", u8 * 72), ("qy", u8 * 72), ("reserved", u8 * 880)]


class sev_cert_signature(Structure):
    """One signature; an ECDSA one is r and s, 72 bytes each and little-endian, at the start of `sig`."""

    _pack_ = 1
    _fields_ = [("usage", u32), ("algo", u32), ("sig", u8 * 512)]


class sev_cert(Structure):
    """An SEV certificate, version 1, with an elliptic-curve key (CEK, PEK, OCA, PDH; ARK and ASK have another form)."""

    _pack_ = 1
    _fields_ = [
        ("version", u32),
        ("api_major", u8),
        ("api_minor", u8),
        ("reserved", u16),
        ("pubkey_usage", u32),
        ("pubkey_algo", u32),
        ("pubkey", sev_ecc_pubkey),
        ("sig1", sev_cert_signature),
        ("sig2", sev_cert_signature),
    ]


AMD_CERT_VERSION = 1
AMD_CERT_KEY_BITS = (2048, 4096)
"""Naples has 2048-bit keys and SHA-256, later families 4096-bit keys and SHA-384."""


class amd_cert_head(Structure):
    """The fixed part of AMD's certificates (ASK, ARK); `pub_exp_size` and `modulus_size` are in bits.

    Public exponent, modulus and signature follow, little-endian; the signature covers everything before it.
    """

    _pack_ = 1
    _fields_ = [
        ("version", u32),
        ("key_id", u8 * 16),
        ("certifying_id", u8 * 16),
        ("key_usage", u32),
        ("reserved", u8 * 16),
        ("pub_exp_size", u32),
        ("modulus_size", u32),
    ]


class sev_session(Structure):
    """LAUNCH_START's session: transport keys wrapped for the platform."""

    _pack_ = 1
    _fields_ = [
        ("nonce", u8 * 16),
        ("wrap_tk", u8 * 32),
        ("wrap_iv", u8 * 16),
        ("wrap_mac", u8 * 32),
        ("policy_mac", u8 * 32),
    ]


class sev_secret_header(Structure):
    """LAUNCH_SECRET's packet header; SEND_UPDATE_DATA produces the same 52 bytes."""

    _pack_ = 1
    _fields_ = [("flags", u32), ("iv", u8 * 16), ("mac", u8 * 32)]


class sev_attestation_report(Structure):
    """GET_ATTESTATION_REPORT's result, signed by the PEK (r and s, 72 bytes each)."""

    _pack_ = 1
    _fields_ = [
        ("mnonce", u8 * 16),
        ("launch_digest", u8 * 32),
        ("policy", u32),
        ("sig_usage", u32),
        ("sig_algo", u32),
        ("reserved", u32),
        ("sig1", u8 * 144),
    ]


class sev_launch_measurement(Structure):
    """LAUNCH_MEASURE's result."""

    _pack_ = 1
    _fields_ = [("measure", u8 * 32), ("mnonce", u8 * 16)]
