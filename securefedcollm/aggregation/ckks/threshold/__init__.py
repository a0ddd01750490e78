"""CKKS under keys that all silos make together; nobody holds one."""
