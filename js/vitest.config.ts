import { defineConfig } from "vitest/config";

// jsdom, not happy-dom: DOMPurify does not sanitise there.
export default defineConfig({ test: { environment: "jsdom", include: ["test/**/*.test.ts"] } });
