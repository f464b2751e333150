"""What the tests need made in a real Keystone: members, the image endpoint, credentials, revocation."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from real_servers import ADMIN_PASSWORD


@dataclass(frozen=True)
class Member:
    """A user with the role `member` in a project of its own."""

    id: str
    name: str
    password: str
    project: str


class KeystoneAdmin:
    """The administrator of a Keystone that `run_keystone` runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._token = self.token_of("admin", ADMIN_PASSWORD, "admin")

    def add_image_endpoint(self, glance_url: str) -> None:
        """Put Glance into the catalog, with /v2 as some clouds have it."""
        service = self._post("services", {"service": {"type": "image", "name": "glance"}})["service"]
        for interface, url in (("public", f"{glance_url}/v2/"), ("internal", glance_url)):
            endpoint = {
                "service_id": service["id"],
                "interface": interface,
                "region_id": "RegionOne",
                "url": url,
            }
            self._post("endpoints", {"endpoint": endpoint})

    def add_member(self) -> Member:
        """Make a project and its only member."""
        name, password = f"user-{secrets.token_hex(4)}", f"pw-{secrets.token_hex(12)}"
        project = self._post("projects", {"project": {"name": f"project-of-{name}"}})["project"]
        user = self._post("users", {"user": {"name": name, "password": password}})["user"]
        roles = self._call("GET", "roles?name=member")["roles"]
        self._call("PUT", f"projects/{project['id']}/users/{user['id']}/roles/{roles[0]['id']}")
        return Member(user["id"], name, password, project["name"])

    def add_application_credential(self, member: Member) -> tuple[str, str]:
        """Return id and secret of a credential that the member makes."""
        token = self.token_of(member.name, member.password, member.project)
        body = {"application_credential": {"name": secrets.token_hex(4)}}
        path = f"users/{member.id}/application_credentials"
        made = self._call("POST", path, body, token)["application_credential"]
        return made["id"], made["secret"]

    def token_of(self, name: str, password: str, project: str) -> str:
        """Log in and return the token."""
        domain = {"id": "default"}
        user = {"name": name, "password": password, "domain": domain}
        identity = {"methods": ["password"], "password": {"user": user}}
        body = {"auth": {"identity": identity, "scope": {"project": {"name": project, "domain": domain}}}}
        reply = httpx.post(f"{self.url}/v3/auth/tokens", json=body, timeout=30)
        reply.raise_for_status()
        token: str = reply.headers["X-Subject-Token"]
        return token

    def revoke(self, token: str) -> None:
        """Make a token worthless at once."""
        headers = {"X-Auth-Token": self._token, "X-Subject-Token": token}
        httpx.delete(f"{self.url}/v3/auth/tokens", headers=headers, timeout=30).raise_for_status()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, body)

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, token: str | None = None
    ) -> dict[str, Any]:
        headers = {"X-Auth-Token": token or self._token}
        reply = httpx.request(method, f"{self.url}/v3/{path}", json=body, headers=headers, timeout=30)
        reply.raise_for_status()
        return reply.json() if reply.content else {}


def write_clouds(path: Path, auth_url: str, auth: dict[str, str], **more: str) -> None:
    """Write a clouds.yaml (JSON is YAML) with the one cloud "here"."""
    cloud = {"auth": {"auth_url": f"{auth_url}/v3", **auth}, "region_name": "RegionOne", **more}
    path.write_text(json.dumps({"clouds": {"here": cloud}}))


def password_auth(member: Member) -> dict[str, str]:
    """Return clouds.yaml's `auth` for a member."""
    return {
        "username": member.name,
        "password": member.password,
        "project_name": member.project,
        "user_domain_id": "default",
        "project_domain_id": "default",
    }
