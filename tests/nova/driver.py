"""Drives the real, unmodified Nova: reads one JSON call a line, answers one JSON line each.

Run by Nova's own Python, as the user Nova runs as.  Nothing of Nova is copied or replaced but what would need
other services: of the database the few calls that the libvirt driver makes are answered from memory, and libvirt
is the stand-in that Nova ships for its own functional tests, unless the configuration names a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

# ruff: noqa: E402  (Nova wants its threading mode chosen before any other import of it)
# Nova's threading mode; its functional tests' package would otherwise ask for the other one.
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "1"
from nova import monkey_patch

monkey_patch.patch(backend="threading")

import nova.conf
import nova.tests.fixtures.libvirt as stand_in
from nova import config, context, objects, utils
from nova.compute import power_state, vm_states
from nova.conf import neutron
from nova.image import glance
from nova.network import model
from nova.privsep import path as privileged
from nova.tests.unit import fake_block_device, fake_instance
from nova.virt import block_device as driver_block_device
from nova.virt import fake, images
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import host
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log
from oslo_privsep import priv_context

HOST = "hypervisor"
USER, PROJECT = "user", "project"
VOLUME_BOOTED = "00000000-0000-4000-8000-00000000b00d"
# What an instance carries with it; anything else Nova would ask the database for.
ATTRIBUTES = (
    "device_metadata",
    "metadata",
    "numa_topology",
    "pci_devices",
    "pci_requests",
    "security_groups",
    "system_metadata",
    "trusted_certs",
    "vcpu_model",
)


class Nova:
    """One nova-compute's libvirt driver, and the instances it was asked for."""

    def __init__(self) -> None:
        # As nova.cmd.compute.main does: configuration, then how to become root.
        config.parse_args(["nova-compute", *sys.argv[1:]])
        log.setup(nova.conf.CONF, "nova")
        priv_context.init(root_helper=shlex.split(utils.get_root_helper()))
        neutron.register_dynamic_opts(nova.conf.CONF)
        objects.register_all()
        if not nova.conf.CONF.libvirt.connection_uri:
            stand_in.LibvirtFixture().setUp()
        # There is no compute manager to hear of a guest's end, and the stand-in has no thread to tell of it.
        mock.patch.object(host.Host, "_event_emit_delayed").start()
        self._context = context.RequestContext(USER, PROJECT, auth_token="token")
        self._driver = libvirt_driver.LibvirtDriver(fake.FakeVirtAPI(), False)
        self._driver.init_host(HOST)
        self._instances: dict[str, objects.Instance] = {}
        self._disks: dict[str, objects.BlockDeviceMappingList] = {}

    # ── calls ──

    def facts(self) -> dict[str, Any]:
        """Who runs, and which cache mode Nova chooses for the disks of guests."""
        return {"uid": os.getuid(), "gid": os.getgid(), "disk_cachemode": self._driver.disk_cachemode}

    def spawn(self, uuid: str, image_id: str, **details: Any) -> str:
        """Start an instance; return the domain XML that libvirt was given."""
        instance = self._instance(uuid, image_id, **details)
        return self._spawn(instance, image_id)

    def unshelve(self, uuid: str, snapshot_id: str, image_id: str, **details: Any) -> str:
        """Start an instance from the image of its shelving, as the compute manager does."""
        instance = self._instance(uuid, snapshot_id, **details)
        instance.vm_state = vm_states.SHELVED_OFFLOADED
        instance.system_metadata = {"image_base_image_ref": image_id}
        xml = self._spawn(instance, snapshot_id)
        instance.vm_state, instance.image_ref = vm_states.ACTIVE, image_id
        return xml

    def snapshot(self, uuid: str) -> str:
        """Stop an instance and upload what it has as an image; return the image's id."""
        instance = self._instances[uuid]
        self._driver.power_off(instance)
        instance.power_state = power_state.SHUTDOWN
        return self._upload_snapshot(instance)

    def live_snapshot(self, uuid: str) -> str:
        """Upload what a running instance has as an image; return the image's id."""
        return self._upload_snapshot(self._instances[uuid])

    def _upload_snapshot(self, instance: objects.Instance) -> str:
        record = {"name": "snapshot", "visibility": "private", "container_format": "bare"}
        image_id: str = glance.API().create(self._context, {**record, "properties": {}})["id"]
        self._driver.snapshot(self._context, instance, image_id, lambda **_states: None)
        return image_id

    def disk_info(self, uuid: str) -> str:
        """What the source of a live migration tells its target of an instance's disks."""
        info: str = self._driver.get_instance_disk_info(self._instances[uuid])
        return info

    def prepare_live_migration(self, uuid: str, image_id: str, disk_info: str) -> None:
        """What the target does about the disks: overlays to copy into, on bases of its own."""
        instance = self._instance(uuid, image_id)
        folder = libvirt_utils.get_instance_path(instance)
        os.mkdir(folder)
        self._driver._create_images_and_backing(self._context, instance, folder, json.loads(disk_info))

    def live_migrate(self, uuid: str, target: str) -> None:
        """The source's part of a live migration with a copy of the disks, to the host with this address."""
        data = objects.LibvirtLiveMigrateData(
            block_migration=True, target_connect_addr=target, serial_listen_addr="", serial_listen_ports=[],
            supported_perf_events=[], bdms=[],
        )  # fmt: skip
        data.migration = objects.Migration(self._context, status="preparing")
        ends: list[str] = []
        self._driver.live_migration(
            self._context,
            self._instances[uuid],
            target,
            lambda *_args: ends.append("migrated"),
            lambda *_args, **_more: ends.append("rolled back"),
            block_migration=True,
            migrate_data=data,
        )
        if ends != ["migrated"]:
            raise RuntimeError(f"the live migration ended as {ends}")

    def forget(self, uuid: str, destroy_disks: bool = True) -> None:
        """End an instance, with its disks or, as a migration's source does, without."""
        self._driver.destroy(self._context, self._instances.pop(uuid), [], destroy_disks=destroy_disks)

    def forget_all(self) -> None:
        """Nova has no instances any more."""
        for uuid in list(self._instances):
            self.forget(uuid)

    def add_instance_without_image(self) -> None:
        """There is an instance that boots from a volume."""
        self._instance(VOLUME_BOOTED, "")

    def manage_image_cache(self) -> None:
        """One pass of the image cache manager, with all instances that there are."""
        self._driver.manage_image_cache(self._context, list(self._instances.values()))

    def fetch_image(self, image_id: str, target: str) -> None:
        """Download an image as the imagebackend does when a base is missing."""
        libvirt_utils.fetch_image(self._context, target, image_id)

    def fetch_raw_image(self, image_id: str, target: str) -> None:
        """Download a kernel or a ramdisk."""
        libvirt_utils.fetch_raw_image(self._context, target, image_id)

    def image_info(self, path: str) -> dict[str, Any]:
        """What Nova thinks of a file: its inspector and its qemu-img info."""
        info = images.qemu_img_info(path)
        return {
            "inspector": str(images.get_image_format(path)),
            "format": info.file_format,
            "size_bytes": info.virtual_size,
            "backing": info.backing_file,
        }

    def utime(self, path: str) -> None:
        """Nova's note that a base is in use, through the privileged helper."""
        privileged.utime(path)

    # ── how ──

    def _instance(
        self,
        uuid: str,
        image_id: str,
        *,
        memory_mb: int = 64,
        root_gb: int = 0,
        ephemeral_gb: int = 0,
        swap_mb: int = 0,
        kernel_id: str = "",
        ramdisk_id: str = "",
        config_drive: bool = False,
    ) -> objects.Instance:
        flavor = objects.Flavor(
            id=1, flavorid="1", name="flavor", vcpus=1, memory_mb=memory_mb, root_gb=root_gb, ephemeral_gb=ephemeral_gb,
            swap=swap_mb, extra_specs={}, is_public=True, disabled=False, rxtx_factor=1.0, vcpu_weight=0,
            description=None, projects=[],
        )  # fmt: skip
        instance = fake_instance.fake_instance_obj(
            self._context, flavor=flavor, id=len(self._instances) + 1, uuid=uuid, image_ref=image_id,
            kernel_id=kernel_id, ramdisk_id=ramdisk_id, host=HOST, node=HOST, vm_state=vm_states.BUILDING,
            root_device_name="/dev/vda", user_id=USER, project_id=PROJECT, display_name="instance",
            os_type="linux", hostname="instance", config_drive="True" if config_drive else "",
            expected_attrs=ATTRIBUTES,
        )  # fmt: skip
        instance.info_cache = objects.InstanceInfoCache(network_info=model.NetworkInfo())
        self._instances[uuid] = instance
        self._disks[uuid] = objects.BlockDeviceMappingList(
            objects=[
                self._blank_disk(uuid, size, guest_format)
                # As nova-api maps a flavor's disks: the swap's size is in MB under the same name.
                for size, guest_format in ((ephemeral_gb, None), (swap_mb, "swap"))
                if size
            ]
        )
        return instance

    def _blank_disk(self, uuid: str, size: int, guest_format: str | None) -> Any:
        return fake_block_device.fake_bdm_object(
            self._context,
            {
                "instance_uuid": uuid,
                "source_type": "blank",
                "destination_type": "local",
                "volume_size": size,
                "guest_format": guest_format,
                "boot_index": -1,
                "delete_on_termination": True,
            },
        )

    def _spawn(self, instance: objects.Instance, image_id: str) -> str:
        meta = objects.ImageMeta.from_image_ref(self._context, glance.API(), image_id)
        disks = self._disks[instance.uuid]
        block_device_info = {
            "root_device_name": instance.root_device_name,
            "ephemerals": driver_block_device.convert_ephemerals(disks),
            "swap": driver_block_device.get_swap(driver_block_device.convert_swap(disks)),
            "block_device_mapping": [],
            "image": driver_block_device.convert_local_images(disks),
        }
        to_libvirt = self._driver._create_guest_with_network
        with mock.patch.object(self._driver, "_create_guest_with_network", wraps=to_libvirt) as creation:
            self._driver.spawn(
                self._context,
                instance,
                meta,
                [],
                None,
                {},
                network_info=[],
                block_device_info=block_device_info,
            )
        instance.vm_state = vm_states.ACTIVE
        xml: str = creation.call_args.args[1]
        return xml

    @contextlib.contextmanager
    def database(self) -> Iterator[None]:
        """Answer from memory what the libvirt driver asks of the database."""
        disks = objects.BlockDeviceMappingList
        with (
            mock.patch.object(
                disks, "bdms_by_instance_uuid", lambda _, uuids: {one: self._disks[one] for one in uuids}
            ),
            mock.patch.object(disks, "get_by_instance_uuid", lambda _, uuid: self._disks[uuid]),
            mock.patch.object(objects.VirtualInterfaceList, "get_by_instance_uuid", return_value=[]),
            mock.patch.object(objects.ShareMappingList, "get_by_instance_uuid", return_value=[]),
            mock.patch.object(objects.Instance, "save"),
            mock.patch.object(objects.BlockDeviceMapping, "save"),
            mock.patch.object(objects.Migration, "save"),
        ):
            yield


def main() -> None:
    """Answer calls until standard input ends."""
    # Nova and what it runs may print: only answers go to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    nova_compute = Nova()
    with nova_compute.database():
        for line in sys.stdin:
            call = json.loads(line)
            try:
                answer = {"result": getattr(nova_compute, call["name"])(**call["details"])}
            except Exception as exc:
                traceback.print_exc()
                answer = {"error": type(exc).__name__, "message": str(exc)}
            print(json.dumps(answer), file=answers, flush=True)
    # Nova's threads, those that wait for libvirt's events among them, have no end of their own.
    os._exit(0)


if __name__ == "__main__":
    main()
